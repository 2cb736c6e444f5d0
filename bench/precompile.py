"""Triton's kernels compiled by all cores before their first use: stage `precompile` of the campaign.

On a GPU a kernel is compiled when it is first launched, one after the other. Here the launches of the campaign's
networks are recorded without a GPU (`bench.launches`), in every tile configuration that is timed and as passes around
the library's convolutions, and compiled into Triton's cache, under the keys by which the launches look there.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bench.launches import WAYS, Specialisation, recorded
from bench.sass import SHARED_LIMIT
from bench.workloads import PARTS, SPEED, Setting
from fastres.kernels.resources import shared_memory_of
from fastres.measure import Workload
from fastres.nn import fuse
from fastres.ops.backends.timed import RANKS
from fastres.train.presets import preset

# Networks that have the same layers as a deeper one, only fewer of them.
SHALLOWER = {"resnet110": "resnet20", "preact_resnet1001": "preact_resnet164"}


@dataclass(frozen=True)
class Job:
    """A step of a network, as one of the candidates that a fused operation's implementation is chosen of."""

    workload: Workload
    dtype: torch.dtype
    recompute: bool  # see `fastres.nn.fuse`
    rank: int | None  # see `recorded`
    training: bool = True
    shared: int | None = None  # bytes of shared memory that a program can have; None: any
    arch: int | None = None  # compute capability of the device, as 90; None: an H100's


def jobs(workload: Workload, dtype: torch.dtype, evaluation: Iterable[int] = ()) -> list[Job]:
    """All that a training step may launch; and inference on batches of the sizes in ``evaluation``."""
    workload = replace(workload, model=SHALLOWER.get(workload.model, workload.model))
    ranks = (*range(RANKS), None)
    found = [Job(workload, dtype, recompute, rank) for recompute in (False, True) for rank in (*ranks, *WAYS)]
    for batch in evaluation:
        found += [Job(replace(workload, batch=batch), dtype, False, rank, training=False) for rank in ranks]
    return found


def evaluated(images: int = 10_000) -> tuple[int, ...]:
    """Batches of the preset ``speed``'s validation, the last one too."""
    batch = min(preset("speed").eval_batch_size, images)
    return tuple({batch, images % batch} - {0})


def launched(job: Job) -> set[Specialisation]:
    """What a job launches, on a machine without a GPU too."""
    torch.set_num_threads(1)
    work = job.workload
    model = fuse(work.build(), job.recompute).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.empty(work.batch, 3, work.image_size, work.image_size)
    images = images.contiguous(memory_format=torch.channels_last)
    model.train(job.training)
    with (
        shared_memory_of(job.shared, job.arch),
        recorded(job.rank) as launches,
        torch.set_grad_enabled(job.training),
    ):
        with torch.autocast("cpu", job.dtype, enabled=job.dtype != torch.float32):
            logits = model(images)
        if job.training:
            logits.float().sum().backward()
    return {launch.specialisation for launch in launches}


def compile_one(one: Specialisation, arch: int) -> str:
    """``"compiled"``, ``"cached"``, or the error. With a GPU the function that launches it is compiled too."""
    target = GPUTarget("cuda", arch, 32)
    cached = (Path(knobs.cache.dir) / one.cache_key(target) / f"{one.kernel}.cubin").exists()
    try:
        kernel = one.compile(target)
        if torch.cuda.is_available():
            driver.active.launcher_cls(kernel.src, kernel.metadata)
    except Exception as error:  # whatever a compilation raises, the others go on
        return f"{one.kernel}: {type(error).__name__}: {error}"[:300]
    return "cached" if cached else "compiled"


class Compiler:
    """Processes that record and compile; to be closed."""

    def __init__(self, arch: int, processes: int | None = None):
        self._arch = arch
        self._pool = ProcessPoolExecutor(processes or os.cpu_count(), get_context("spawn"))
        self._done: set[Specialisation] = set()

    def close(self) -> None:
        """End the processes."""
        self._pool.shutdown(cancel_futures=True)

    def compile(self, work: list[Job], most: int | None = None) -> dict[str, object]:
        """Compile what the jobs launch and no earlier ones did, or only the first ``most`` of it.

        Returns:
            Numbers of ``specialisations`` and of those ``compiled`` or ``cached`` already, ``errors``, and seconds to
            record and in all.
        """
        start = time.monotonic()
        limit = SHARED_LIMIT.get(self._arch)
        found: set[Specialisation] = set()
        for one in self._pool.map(launched, [replace(job, shared=limit, arch=self._arch) for job in work]):
            found |= one
        found -= self._done
        recorded_in = time.monotonic() - start
        # The products first, which take longest to compile: none of them is begun last.
        ordered = sorted(found, key=lambda one: (not one.kernel.startswith("conv"), str(one)))[:most]
        outcomes: Counter[str] = Counter(self._outcomes(ordered))
        self._done |= found
        return {
            "specialisations": len(found),
            "compiled": outcomes.pop("compiled", 0),
            "cached": outcomes.pop("cached", 0),
            "errors": sorted(outcomes),
            "seconds_to_record": round(recorded_in, 1),
            "seconds": round(time.monotonic() - start, 1),
        }

    def _outcomes(self, found: Iterable[Specialisation]) -> Iterator[str]:
        futures = [self._pool.submit(compile_one, one, self._arch) for one in found]
        for future in as_completed(futures):
            yield future.result()


def networks(setting: Setting) -> dict[str, list[Job]]:
    """Jobs of all that the campaign measures, in its order."""
    if setting.dry:
        return {name: [Job(one, setting.dtype, False, 0)] for name, one in setting.workloads().items()}
    work = setting.workloads()
    return {
        **{name: jobs(work[name], setting.dtype) for name in work},
        "speed": jobs(SPEED, setting.dtype, evaluated()),
        **{name: jobs(one, setting.dtype) for name, one in {**setting.pick(PARTS, {}, {}), **setting.sweeps()}.items()},
    }
