"""Every kernel of the fused networks compiled ahead of time for the GPUs that there are not: ``python -m bench.aot``.

The launches of training steps and of inference are recorded (`bench.aot_plan`), their specialisations compiled for each
architecture by Triton, and registers, spills, shared memory, tensor-core instructions and the width of loads and stores
read from the machine code (`bench.sass`, `bench.gcn`); how many programs a multiprocessor runs at once, and what share
of the tensor cores' peak or of the memory's bandwidth the model predicts (`bench.machine`), whichever the kernel needs
longer. One table row stands for all specialisations that differ in nothing but their numbers of channels and the sizes
of their images, and is that of the largest; ``--every-shape`` compiles them all.

What is compiled is kept, so a run goes on where an earlier one ended, and ``--minutes 0`` tells what there is; the
result says what it covers. Exits with 1 when a configuration does not compile, spills more than `bench.sass.SPILLED`,
takes more shared memory than there is, has a `tl.dot` but no tensor-core instruction, or is slower by the model than
`bench.machine.shares` allows.
"""

from __future__ import annotations

import argparse
import functools
import gc
import hashlib
import importlib
import inspect
import json
import multiprocessing
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from bench import gcn, sass
from bench.aot_plan import ALL_RANKS, CHANNELS, NETWORKS, PADDING, PRECISIONS, SIZES, Task, channels, planned
from bench.launches import Specialisation
from bench.machine.shares import fault, occupancy, share
from bench.record import write_results
from bench.sass import SHARED_LIMIT, Architecture, Resources
from fastres.atomic import atomic_write
from fastres.kernels import tiles
from fastres.ops.timing import choices_path

ARCHITECTURES = tuple(SHARED_LIMIT)
BATCH = 16  # kernels that are disassembled as one


@dataclass(frozen=True)
class Row:
    """One specialisation compiled for one architecture."""

    specialisation: Specialisation
    arch: Architecture
    resources: Resources | None
    error: str = ""  # of the compilation
    share: float | None = None  # of the tensor cores or of the memory, by the model; None: not modelled
    first: bool = False  # whether it is the configuration that is taken first, which has a floor
    planned: str = ""  # key of `PRECISIONS` that it was compiled for; small work in fp32 belongs to all

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


def compile_all(
    tasks: Iterable[tuple[Specialisation, Architecture]], processes: int = 1, until: float = float("inf")
) -> Iterator[Row]:
    """Compile each for its architecture; rows come as they are ready, from the cache where it has them.

    Args:
        until: of `time.monotonic`: behind it nothing more is compiled.
    """
    waiting = []
    for one, arch in tasks:
        found = kept(one, arch)
        if found is None:
            waiting.append((one, arch))
        else:
            yield Row(one, arch, found)
    batches = _batches(waiting)
    if processes == 1:
        for batch in batches:
            if time.monotonic() >= until:
                return
            yield from compile_batch(batch)
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for rows in pool.imap_unordered(compile_batch, batches):
            yield from rows
            if time.monotonic() >= until:
                return  # ends the processes


def _batches(tasks: list[tuple[Specialisation, Architecture]]) -> Iterator[list[tuple[Specialisation, Architecture]]]:
    """Those of one architecture together, at most `BATCH`, nearly in order."""
    size = BATCH * max(1, len({arch for _, arch in tasks}))
    for begin in range(0, len(tasks), size):
        of_arch: dict[Architecture, list[tuple[Specialisation, Architecture]]] = {}
        for task in tasks[begin : begin + size]:
            of_arch.setdefault(task[1], []).append(task)
        for alike in of_arch.values():
            yield from (alike[first : first + BATCH] for first in range(0, len(alike), BATCH))


def modelled(row: Row, task: Task) -> Row:
    """The row with the model's share, for a launch of its specialisation."""
    if row.resources is None or isinstance(row.arch, str):
        return row
    return replace(row, share=share(task.launch, row.arch), first=task.first)


def kept(one: Specialisation, arch: Architecture) -> Resources | None:
    """What an earlier run found: ``aot/`` beside the timed choices, by all that the result depends on."""
    try:
        return Resources(**json.loads(_path(one, arch).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _path(one: Specialisation, arch: Architecture) -> Path:
    key = f"{one.source().hash()} {one.options} sm_{arch} triton {triton.__version__} {_measured_by(arch)}"
    return choices_path().parent / "aot" / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def _measured_by(arch: Architecture) -> str:
    files = [sass.__file__, *([gcn.__file__] if isinstance(arch, str) else [])]
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()


def compile_batch(tasks: list[tuple[Specialisation, Architecture]]) -> list[Row]:
    """Compile specialisations for one architecture, and keep what was found."""
    arch = tasks[0][1]
    rows, compiled = [], []
    for one, _ in tasks:
        try:
            compiled.append((one, one.compile(target_of(arch))))
        except Exception as error:  # whatever the compiler raises is the row's verdict
            rows.append(Row(one, arch, None, f"{type(error).__name__}: {str(error).strip()[-300:]}"))
    read = (gcn if isinstance(arch, str) else sass).resources([kernel for _, kernel in compiled])
    for (one, _), found in zip(compiled, read):
        path = _path(one, arch)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(json.dumps(found._asdict()).encode())
        rows.append(Row(one, arch, found))
    return rows


def target_of(arch: Architecture) -> GPUTarget:
    """What Triton compiles for."""
    return GPUTarget("hip", arch, 64) if isinstance(arch, str) else GPUTarget("cuda", arch, 32)


COLUMNS = ("kernel", "dtype", "channels", "variant", "tile", "warps", "stages", "architecture", "registers", "spills",
           "shared KB", "wide loads", "wide stores", "tensor cores", "programs an SM", "share of its bound",
           "verdict")  # fmt: skip


def cells(row: Row) -> list[str]:
    """The row as `COLUMNS` of text; the share of what binds (tensor cores or memory) is `bench.machine`'s."""
    record = as_record(row)
    head = [str(record.get(name, "")) for name in ("kernel", "precision", "channels", "variant", "tile", "warps",
                                                   "stages", "arch")]  # fmt: skip
    found = row.resources
    if found is None:
        return [*head, *[""] * 8, row.error]
    cores = ", ".join(f"{count} {name}" for name, count in found.tensor_cores.items())
    wide = ["" if share is None else f"{share:.0%}" for share in (found.wide_loads, found.wide_stores)]
    measured = [str(found.registers), str(found.spills), f"{found.shared / 1000:.0f}", *wide, cores]
    modelled = [str(row.occupancy or ""), "" if row.share is None else f"{row.share:.0%}"]
    return [*head, *measured, *modelled, "; ".join(row.faults) or "ok"]


def as_record(row: Row) -> dict[str, Any]:
    """The row as JSON."""
    one, options = row.specialisation, dict(row.specialisation.options)
    tile = [value for name, value in one.constants.items() if name.startswith("BLOCK")]
    return {
        "kernel": one.kernel.removesuffix("_kernel"),
        "precision": precision_of(one),
        "arch": row.arch,
        "planned": row.planned,
        "first": row.first,
        "channels": " ".join(map(str, channels(one))),
        "variant": variant(one),
        "tile": "x".join(map(str, tile)),
        "warps": options.get("num_warps"),
        **({"stages": options["num_stages"], "limit": options.get("maxnreg")} if "num_stages" in options else {}),
        **({} if row.resources is None else row.resources._asdict()),
        "occupancy": row.occupancy,
        "share": None if row.share is None else round(row.share, 4),
        "faults": row.faults,
    }


def variant(one: Specialisation) -> str:
    """What else tells a specialisation from others of its kernel: window, stride, optional tensors, flags."""
    known = CHANNELS | PADDING | SIZES | {"PRECISION", "STAGES", "IN_FLIGHT", "WARPS"}
    constants = {name: value for name, value in one.constants.items() if name not in known}
    window = "{}x{}/{}".format(*(constants.pop(name, None) for name in ("KH", "KW", "STRIDE")))
    dilation, _, _ = (constants.pop(name, 1) for name in ("DILATION", "TAP_STEP", "INVERSE"))
    parts = [] if "None" in window else [window if dilation == 1 else f"{window} dilation {dilation}"]
    parts += [name.removesuffix("_ptr") for name in one.pointers if _is_optional(name, one)]
    for name, value in constants.items():
        if value is not None and value is not False and not name.startswith("BLOCK"):
            parts.append(name.lower() if value is True else f"{name.lower()}={value}")
    return " ".join(parts)


def _is_optional(name: str, one: Specialisation) -> bool:
    """Whether some variant of the kernel goes without this tensor: it is compared with None in the source, perhaps of a
    function that the kernel calls."""
    source = one.function.src + _source(one.module)
    return f"{name} is not None" in source or f"{name} is None" in source


@functools.cache
def _source(module: str) -> str:
    """Of a module of kernels, and of the shared device code that it calls."""
    source = inspect.getsource(importlib.import_module(module))
    shared = (one.src for name, one in vars(tiles).items() if isinstance(one, JITFunction) and f" {name}(" in source)
    return source + "".join(shared)


def precision_of(one: Specialisation) -> str:
    """The key of `PRECISIONS` that a specialisation belongs to."""
    kinds = set(one.pointers.values())
    if kinds & {"bf16", "fp16"}:
        return next(iter(kinds & {"bf16", "fp16"}))
    return "tf32" if one.constants.get("PRECISION") == "tf32" else "fp32"


def coverage(tasks: list[Task], rows: dict[tuple[Specialisation, Architecture], Row]) -> list[dict[str, Any]]:
    """How many of the planned compilations the rows are, and how many of those are modelled, by architecture and
    precision."""
    found: dict[tuple, dict[str, Any]] = {}
    for task in tasks:
        key = task.arch, task.precision, task.first
        counts = found.setdefault(
            key,
            {"arch": task.arch, "precision": task.precision, "configurations": "first" if task.first else "further",
             "compiled": 0, "of": 0, "modelled": 0},
        )  # fmt: skip
        row = rows.get((task.specialisation, task.arch))
        counts["of"] += 1
        counts["compiled"] += row is not None
        counts["modelled"] += row is not None and row.share is not None
    return list(found.values())


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
    parser.add_argument(
        "--arch", nargs="+", type=_architecture, choices=SHARED_LIMIT, default=list(ARCHITECTURES), help="(all)"
    )
    parser.add_argument("--kernel", nargs="+", default=[], metavar="NAME", help="only kernels whose names begin so")
    parser.add_argument(
        "--rank", nargs="+", type=int, choices=ALL_RANKS, default=list(ALL_RANKS),
        help="of the configurations, the first at 0; behind them other ways to share between gradients (all)",
    )  # fmt: skip
    parser.add_argument("--every-shape", action="store_true", help="every number of channels, not the largest only")
    parser.add_argument("--no-model", action="store_true", help="without the model's shares, which take a second each")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing more after that long")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    return parser.parse_args(argv)


def _architecture(text: str) -> Architecture:
    return int(text) if text.isdigit() else text


def main(argv: list[str] | None = None) -> int:
    """Compile, print the table, say what must not be shipped and what is missing."""
    options = parse(argv)
    until = time.monotonic() + 60 * options.minutes
    gc.freeze()  # what is imported stays
    gc.set_threshold(200_000, 50, 50)  # collections at each syntax tree of a kernel are a tenth of the time
    tasks = planned(
        options.network, options.precision, options.arch, options.rank, tuple(options.kernel), options.every_shape
    )
    by_key = {(task.specialisation, task.arch): task for task in tasks}
    found: dict[tuple[Specialisation, Architecture], Row] = {}
    for row in compile_all(by_key, options.processes, until):
        key = row.specialisation, row.arch
        found[key] = replace(row, first=by_key[key].first, planned=by_key[key].precision)
        print(f"\r{len(found)} of {len(by_key)} compiled", end="", file=sys.stderr, flush=True)
    for count, (key, row) in enumerate([] if options.no_model else found.items(), 1):
        if time.monotonic() < until:
            found[key] = modelled(row, by_key[key])
            print(f"\r{count} of {len(found)} modelled", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    rows = sorted(found.values(), key=cells)
    print(table([cells(row) for row in rows], options.markdown))
    faulty = [row for row in rows if row.faults]
    print(f"\n{len(rows)} compiled of {len(by_key)} planned, {len(faulty)} not to be shipped")
    for row in faulty:
        print("  " + " ".join(cells(row)))
    if options.json:
        asked = {"networks": options.network, "precisions": options.precision, "ranks": options.rank}
        covered = coverage(tasks, found)
        write_results(options.json, {"asked": asked, "coverage": covered, "rows": [as_record(row) for row in rows]})
    return bool(faulty)


if __name__ == "__main__":
    sys.exit(main())
