"""What the host does for a repeated step, without a GPU: its launches by Triton's launcher and by the driver, and all.

    python -m bench.host

Kernels are compiled for sm_90 as on a GPU (minutes, once) and launched through a driver of which every function returns
at once; the activations are a CPU's, which nothing reads. What is timed is `fastres.ops.backends.replay.Program.run` of
every walk of a training step (memory, addresses and launches), and forward and backward as a whole: Python, autograd
and those. No weight is cast meanwhile, as a CPU would do that itself. A real driver adds its own time to each launch.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

from bench.record import RESULTS, ROOT, write_results
from bench.tables import markdown
from fastres import ops
from fastres.measure import Workload
from fastres.nn import fuse
from fastres.ops.backends import launches, replay
from fastres.ops.backends.launches import ENVIRONMENT
from fastres.ops.backends.triton import Triton

NETWORKS = {
    "resnet50": Workload("resnet50", 1, 64, {"stem": "imagenet", "num_classes": 1000}),
    "resnet18": Workload("resnet18", 1, 32, {"stem": "cifar"}),
    "notebook": Workload("notebook", 1, 32, {}),
    "resnet20": Workload("resnet20", 1, 32, {}),
}
LAUNCHERS = ("triton", "driver")
WARMUP = 3  # steps until every walk is a list
_ARCH, _SHARED, _MULTIPROCESSORS, _THREADS = 90, 232448, 132, 1024  # an H100's


def build_driver(folder: Path) -> None:
    """A libcuda.so.1 with all functions that Triton's launcher and ours call; they return 0, which is success."""
    source = Path(nvidia.dirname, "driver.c").read_text() + Path(nvidia.__file__).read_text()
    names = {*re.findall(r"\b(cu[A-Z]\w+)\b", source), *launches.FUNCTIONS}
    lines = ["static long made; long launches(void) { return made; }"]
    for name in sorted(names - {"cuCtxGetCurrent"}):
        counted = "++made; " if name.startswith("cuLaunchKernel") else ""
        lines.append(f"int {name}(void) {{ {counted}return 0; }}")
    lines.append("int cuCtxGetCurrent(void** context) { *context = (void*)1; return 0; }")
    (folder / "driver.c").write_text("\n".join(lines) + "\n")
    target = folder / "libcuda.so.1"
    options = ["-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1"]
    subprocess.run(["cc", *options, str(folder / "driver.c"), "-o", str(target)], check=True)
    (folder / "libcuda.so").symlink_to(target)


class _Device:
    """What Triton asks of the present device."""

    launcher_cls = nvidia.CudaLauncher

    def __init__(self) -> None:
        own = nvidia.CudaUtils()
        self.utils = SimpleNamespace(
            launch=getattr(own, "launch", None),  # from Triton 3.7 on
            build_signature_metadata=getattr(own, "build_signature_metadata", None),
            get_device_properties=lambda device: {"max_shared_mem": _SHARED, "multiprocessor_count": _MULTIPROCESSORS},
            load_binary=lambda name, kernel, shared, device: (1, 4096, 0, 0, _THREADS),
        )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", _ARCH, 32)


def measure(name: str, steps: int) -> dict[str, float]:
    """Milliseconds of all lists of a step, median and quartiles, and of forward and backward; launches; calls of the
    launcher.
    """
    torch.set_num_threads(1)
    driver.set_active(_Device())
    workload, backend = NETWORKS[name], Triton()
    model = fuse(workload.build()).to(memory_format=torch.channels_last)
    images, _ = workload.inputs(torch.device("cpu"))
    run, spent, samples, steps_of_host = replay.Program.run, [0.0], [], []

    def timed(self: replay.Program, inputs: list) -> list:
        begin = time.perf_counter()
        result = run(self, inputs)
        spent[0] += time.perf_counter() - begin
        return result

    a_gpus: dict[str, Any] = dict(_is_plain=lambda inputs: True, _stream=lambda device: 0, _settings=lambda: ())
    with (
        mock.patch.multiple(replay, **a_gpus, _compile=lambda walk: None),
        mock.patch.object(replay.Program, "run", timed),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False),
        mock.patch.object(torch, "_foreach_copy_", lambda *casts: None),
        ops.implementation(backend),
    ):
        for _ in range(WARMUP + steps):
            spent[0], before, begin = 0.0, _launches(), time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(images)
            logits.float().sum().backward()
            steps_of_host.append(1e3 * (time.perf_counter() - begin))
            samples.append(1e3 * spent[0])
            model.zero_grad(set_to_none=True)
    lists = [one for one in backend.programs.known if isinstance(one, replay.Program)]
    low, median, high = statistics.quantiles(samples[WARMUP:], n=4)
    stages = sum(len(one.stages) for one in lists)
    return {
        "ms": median,
        "low": low,
        "high": high,
        "host_ms": statistics.median(steps_of_host[WARMUP:]),
        "launches": _launches() - before,
        "lists": len(lists),
        "calls": stages,
    }


def _launches() -> int:
    return ctypes.CDLL("libcuda.so.1").launches()


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """A row a network."""
    rows = []
    for name, found in results.items():
        by = [found[one]["ms"] for one in LAUNCHERS]
        counts = [str(found["driver"][key]) for key in ("launches", "calls")]
        rows.append(
            [name, *counts, *(f"{ms:.2f}" for ms in by), f"{by[0] / by[1]:.1f}x", f"{found['driver']['host_ms']:.2f}"]
        )
    columns = ["a training step", "launches", "calls of the driver's loop", "ms, by Triton", "by the driver", "",
               "all of forward and backward, ms"]  # fmt: skip
    return markdown(columns, rows)


def main(argv: list[str] | None = None) -> None:
    """Measure each network by each launcher in a process of its own; print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--one", choices=NETWORKS, help=argparse.SUPPRESS)  # what a process measures
    parser.add_argument("--out", type=Path, help="result file [bench/results/host-triton<version>.json]")
    args = parser.parse_args(argv)
    if args.one:
        return print(json.dumps(measure(args.one, args.steps)))
    results: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        build_driver(Path(folder))
        places = {"TRITON_LIBCUDA_PATH": folder, "LD_LIBRARY_PATH": folder}
        for name in args.networks:
            for launcher in LAUNCHERS:
                environment = os.environ | places | {ENVIRONMENT: launcher}
                command = [sys.executable, "-m", "bench.host", "--one", name, "--steps", str(args.steps)]
                done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
                results.setdefault(name, {})[launcher] = json.loads(done.stdout.splitlines()[-1])
    print(table(results))
    version = triton.__version__
    write_results(args.out or RESULTS / f"host-triton{version}.json", {"networks": results, "load": os.getloadavg()[0]})


if __name__ == "__main__":
    main()
