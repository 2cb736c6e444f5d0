"""Every kernel of the fused networks compiled ahead of time for the GPUs that there are not: ``python -m bench.aot``.

The launches of training steps and of inference are recorded (`bench.launches`), their specialisations compiled for
each architecture by Triton, and registers, spills, shared memory, tensor-core instructions and the width of loads and
stores read from the machine code (`bench.sass`); how many programs a multiprocessor runs at once, and what share of the
tensor cores' peak or of the memory's bandwidth the model predicts (`bench.machine`), whichever the kernel needs longer.
One table row stands for all specialisations that differ in nothing but their numbers of channels, and is that of the
largest; ``--every-shape`` compiles them all. Exits with 1 when a configuration does not compile, spills, takes more
shared memory than there is, has a `tl.dot` but no tensor-core instruction, or is slower by the model than
`bench.machine.shares` allows.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget

from bench.launches import Launch, Specialisation, recorded
from bench.machine.shares import fault, occupancy, share
from bench.record import write_results
from bench.sass import SHARED_LIMIT, Resources, resources
from fastres.atomic import atomic_write
from fastres.kernels.configs import has_warp_groups
from fastres.kernels.resources import shared_memory_of
from fastres.models import create_model
from fastres.models.fused import create_fused_model
from fastres.nn import fold
from fastres.ops.timing import choices_path

ARCHITECTURES = 80, 89, 90, 100  # by default; sm_86 and sm_120 take what sm_89 takes
RANKS = 3  # as many configurations as a launcher offers at most; one with fewer repeats its last
# Networks that have every kernel and every width between them, with the shape of a batch and the model's options.
NETWORKS: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "resnet50 ImageNet": ("resnet50", (64, 3, 224, 224), {"num_classes": 1000}),
    "resnet50 CIFAR": ("resnet50", (128, 3, 32, 32), {"stem": "cifar"}),
    "resnet18 ImageNet": ("resnet18", (64, 3, 224, 224), {"num_classes": 1000}),
    "resnet18 CIFAR": ("resnet18", (128, 3, 32, 32), {"stem": "cifar"}),
    "resnet8": ("resnet8", (512, 3, 32, 32), {}),
    "resnet20": ("resnet20", (128, 3, 32, 32), {}),  # resnet110 has the same layers, only more of them
    "preact_resnet164": ("preact_resnet164", (128, 3, 32, 32), {}),  # and so has preact_resnet1001
    "notebook": ("notebook", (64, 3, 96, 96), {}),
    "speed": ("speed", (256, 3, 32, 32), {}),
}
CHANNELS, PADDING = {"C", "CIN", "COUT"}, {"TOP", "LEFT"}  # compile-time arguments that do not make a row of their own
PRECISIONS = {  # name: dtype, and whether fp32 may be rounded to tf32
    "bf16": (torch.bfloat16, False),
    "fp16": (torch.float16, False),
    "tf32": (torch.float32, True),
    "fp32": (torch.float32, False),
}


@dataclass(frozen=True)
class Row:
    """One specialisation compiled for one architecture."""

    specialisation: Specialisation
    arch: int
    resources: Resources | None
    error: str = ""  # of the compilation
    share: float | None = None  # of the tensor cores or of the memory, by the model; None: not modelled
    first: bool = False  # whether it is the configuration that is taken first, which has a floor

    @property
    def faults(self) -> list[str]:
        """Why it must not be shipped; empty: it may."""
        if self.resources is None:
            return [self.error]
        slow = fault(self.specialisation, self.arch, self.share) if self.first else []
        return self.resources.faults(self.arch) + slow

    @property
    def occupancy(self) -> int | None:
        """Programs that a multiprocessor runs at once; None: none fits, or the GPU is not known."""
        if self.resources is None:
            return None
        return occupancy(self.resources, dict(self.specialisation.options).get("num_warps", 4), self.arch)


def specialisations(
    network: str,
    precision: str,
    ranks: Iterable[int] = range(RANKS),
    shared: int | None = None,
    arch: int | None = None,
) -> set[Specialisation]:
    """All that a training step (also with the memory mode, and with frozen BatchNorm) and inference launch.

    Args:
        network, precision: keys of `NETWORKS` and `PRECISIONS`.
        shared: bytes of shared memory that a program can have on the device, by which configurations are chosen; None:
            any.
        arch: the device's compute capability, by which they are chosen too; None: an H100's.
    """
    return set(launches_of(network, precision, ranks, shared, arch))


def launches_of(
    network: str,
    precision: str,
    ranks: Iterable[int] = range(RANKS),
    shared: int | None = None,
    arch: int | None = None,
) -> dict[Specialisation, Launch]:
    """`specialisations`, each with the launch of it at the lowest rank that has the most programs."""
    name, shape, options = NETWORKS[network]
    dtype, tf32 = PRECISIONS[precision]
    images = torch.empty(shape).contiguous(memory_format=torch.channels_last)
    found: dict[Specialisation, Launch] = {}
    with _convolutions_in_tf32(tf32), shared_memory_of(shared, arch):
        each = [(0, False)] if 0 in ranks else []
        for rank, dy_once in [*((rank, True) for rank in ranks), *each]:
            for run in _runs(name, options):
                with recorded(rank, dy_once) as launches:
                    run(images, dtype)
                for launch in launches:
                    known = found.get(launch.specialisation, launch)
                    found[launch.specialisation] = min(known, launch, key=lambda one: (one.rank or 0, -one.programs))
    return found


def _runs(name: str, options: dict[str, Any]) -> Iterator[Callable[[Tensor, torch.dtype], None]]:
    for recompute in (False, True):
        yield _step(create_fused_model(name, recompute=recompute, **options))
    yield _step(create_fused_model(name, **options).eval())
    yield _inference(fold(create_model(name, **options)))


def _step(model: nn.Module) -> Callable[[Tensor, torch.dtype], None]:
    def run(images: Tensor, dtype: torch.dtype) -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = model(images)
        logits.float().sum().backward()

    return run


def _inference(model: nn.Module) -> Callable[[Tensor, torch.dtype], None]:
    def run(images: Tensor, dtype: torch.dtype) -> None:
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            model(images)

    return run


@contextmanager
def _convolutions_in_tf32(allowed: bool) -> Iterator[None]:
    switch = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before, switch.fp32_precision = switch.fp32_precision, "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        switch.fp32_precision = before


def representatives(found: Iterable[Specialisation]) -> list[Specialisation]:
    """Of those that differ in their numbers of channels only, the one with the most; in a stable order."""
    classes: dict[tuple, Specialisation] = {}
    for one in sorted(found, key=lambda s: (s.kernel, _channels(s), str(s))):
        classes[_class_of(one)] = one
    return list(classes.values())


def _channels(one: Specialisation) -> tuple[int, ...]:
    return tuple(value for name, value in one.constants.items() if name in CHANNELS)


def _class_of(one: Specialisation) -> tuple:
    constants = {name: math.gcd(value, 64) if name in CHANNELS else value for name, value in one.constants.items()}
    for side in PADDING & constants.keys():
        constants[side] = constants[side] != 0
    return one.kernel, tuple(one.pointers.items()), tuple(constants.items()), one.options


def compile_all(found: Iterable[Specialisation], archs: Iterable[int], processes: int = 1) -> Iterator[Row]:
    """Compile each for each architecture; rows come as they are ready, from the cache where it has them."""
    tasks = [(one, arch) for one in found for arch in archs]
    if processes == 1:
        yield from map(compile_one, tasks)
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap_unordered(compile_one, tasks)


def modelled(row: Row, launch: Launch) -> Row:
    """The row with the model's share, for a launch of its specialisation."""
    return row if row.resources is None else replace(row, share=share(launch, row.arch), first=launch.rank == 0)


def compile_one(task: tuple[Specialisation, int]) -> Row:
    """Compile a specialisation for an architecture, or read what an earlier run found.

    The cache, ``aot/`` beside the timed choices, is keyed by all that the result depends on.
    """
    one, arch = task
    source = one.source()
    key = f"{source.hash()} {one.options} sm_{arch} triton {triton.__version__} {_measured_by()}"
    path = choices_path().parent / "aot" / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
    try:
        return Row(one, arch, Resources(**json.loads(path.read_text())))
    except (OSError, ValueError, TypeError):
        pass
    try:
        kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(one.options))
        found = resources(kernel)
    except Exception as error:  # whatever the compiler raises is the row's verdict
        return Row(one, arch, None, f"{type(error).__name__}: {str(error).strip()[-300:]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(json.dumps(found._asdict()).encode())
    return Row(one, arch, found)


def _measured_by() -> str:
    return hashlib.sha256(Path(resources.__code__.co_filename).read_bytes()).hexdigest()


COLUMNS = ("kernel", "dtype", "channels", "variant", "tile", "warps", "stages", "sm", "registers", "spills",
           "shared KB", "wide loads", "wide stores", "tensor cores", "programs an SM", "share of its bound",
           "verdict")  # fmt: skip


def cells(row: Row) -> list[str]:
    """The row as `COLUMNS` of text; the share of what binds (tensor cores or memory) is `bench.machine`'s."""
    one, found, options = row.specialisation, row.resources, dict(row.specialisation.options)
    head = [
        one.kernel.removesuffix("_kernel"),
        precision_of(one),
        " ".join(map(str, _channels(one))),
        variant(one),
        "x".join(str(value) for name, value in one.constants.items() if name.startswith("BLOCK")),
        str(options.get("num_warps", "")),
        str(options.get("num_stages", "")),
        str(row.arch),
    ]
    if found is None:
        return [*head, *[""] * 8, row.error]
    cores = ", ".join(f"{count} {name}" for name, count in found.tensor_cores.items())
    wide = ["" if share is None else f"{share:.0%}" for share in (found.wide_loads, found.wide_stores)]
    measured = [str(found.registers), str(found.spills), f"{found.shared / 1000:.0f}", *wide, cores]
    modelled = [str(row.occupancy or ""), "" if row.share is None else f"{row.share:.0%}"]
    return [*head, *measured, *modelled, "; ".join(row.faults) or "ok"]


def variant(one: Specialisation) -> str:
    """What else tells a specialisation from others of its kernel: window, stride, optional tensors, flags."""
    constants = {name: value for name, value in one.constants.items() if name not in CHANNELS | PADDING | {"PRECISION"}}
    window = "{}x{}/{}".format(*(constants.pop(name, None) for name in ("KH", "KW", "STRIDE")))
    dilation, _, _ = (constants.pop(name, 1) for name in ("DILATION", "TAP_STEP", "INVERSE"))
    parts = [] if "None" in window else [window if dilation == 1 else f"{window} dilation {dilation}"]
    parts += [name.removesuffix("_ptr") for name in one.pointers if _is_optional(name, one)]
    for name, value in constants.items():
        if value is not None and value is not False and not name.startswith("BLOCK"):
            parts.append(name.lower() if value is True else f"{name.lower()}={value}")
    return " ".join(parts)


def _is_optional(name: str, one: Specialisation) -> bool:
    """Whether some variant of the kernel goes without this tensor: it is compared with None in the source."""
    return f"{name} is not None" in one.function.src or f"{name} is None" in one.function.src


def precision_of(one: Specialisation) -> str:
    """The key of `PRECISIONS` that a specialisation belongs to."""
    kinds = set(one.pointers.values())
    if kinds & {"bf16", "fp16"}:
        return next(iter(kinds & {"bf16", "fp16"}))
    return "tf32" if one.constants.get("PRECISION") == "tf32" else "fp32"


def as_record(row: Row) -> dict[str, Any]:
    """The row as JSON."""
    one = row.specialisation
    return {
        "kernel": one.kernel,
        "precision": precision_of(one),
        "arch": row.arch,
        "tensors": one.pointers,
        "constants": {name: value for name, value in one.constants.items() if value is not None},
        "options": dict(one.options),
        **({} if row.resources is None else row.resources._asdict()),
        "occupancy": row.occupancy,
        "share": row.share,
        "faults": row.faults,
    }


def table(rows: list[list[str]], markdown: bool) -> str:
    """Rows under `COLUMNS`, aligned or as Markdown."""
    if markdown:
        lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows)]
    aligned = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths)) for line in [COLUMNS, *rows])
    return "\n".join(line.rstrip() for line in aligned)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=__doc__.split("\n\n")[0])
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="whose layers (all)")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="(all)")
    archs = " ".join(map(str, ARCHITECTURES))
    parser.add_argument(
        "--arch", nargs="+", type=int, choices=SHARED_LIMIT, default=list(ARCHITECTURES), help=f"({archs})"
    )
    parser.add_argument("--kernel", nargs="+", metavar="NAME", help="only kernels whose names begin so")
    parser.add_argument("--rank", nargs="+", type=int, default=list(range(RANKS)), help="of the configurations (all)")
    parser.add_argument("--every-shape", action="store_true", help="every number of channels, not the largest only")
    parser.add_argument("--no-model", action="store_true", help="without the model's shares, which take a second each")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    return parser.parse_args(argv)


def launched(options: argparse.Namespace) -> Iterator[tuple[dict[Specialisation, Launch], list[int]]]:
    """What devices of the same shared memory and kind of tensor cores launch, with their architectures."""

    def kind(arch: int) -> tuple[int, bool]:
        return SHARED_LIMIT[arch], has_warp_groups(arch)

    for (limit, _), archs in itertools.groupby(sorted(options.arch, key=kind), kind):
        alike = list(archs)
        found: dict[Specialisation, Launch] = {}
        for network, precision in itertools.product(options.network, options.precision):
            found |= launches_of(network, precision, options.rank, limit, alike[0])
        if options.kernel:
            found = {one: found[one] for one in found if one.kernel.startswith(tuple(options.kernel))}
        yield found, alike


def main(argv: list[str] | None = None) -> int:
    """Compile, print the table, say what must not be shipped."""
    options = parse(argv)
    everything: set[Specialisation] = set()
    rows = []
    for found, archs in launched(options):
        everything |= found.keys()
        chosen = list(found) if options.every_shape else representatives(found)
        for row in compile_all(chosen, archs, options.processes):
            rows.append(row if options.no_model else modelled(row, found[row.specialisation]))
            print(f"\r{len(rows)} compiled", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    rows.sort(key=cells)
    print(table([cells(row) for row in rows], options.markdown))
    faulty = [row for row in rows if row.faults]
    print(f"\n{len(rows)} compiled from {len(everything)} specialisations, {len(faulty)} not to be shipped")
    for row in faulty:
        print("  " + " ".join(cells(row)))
    if options.json:
        write_results(options.json, {"specialisations": len(everything), "rows": [as_record(row) for row in rows]})
    return bool(faulty)


if __name__ == "__main__":
    sys.exit(main())
