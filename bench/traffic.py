"""Bytes that a training step of each block moves: eager PyTorch, torch.compile, fused: ``python -m bench.traffic``.

Nothing is timed and no GPU is needed. See `bench.count_triton`, `bench.count_eager` and `bench.count_inductor` for how
each is counted, `bench.count_saved` for the memory kept. A stage is counted as a whole and its first block alone; the
difference, shared out, is that of each further block. Of a stage of more than `MOST` blocks as many are counted as make
the first block and a chain of further ones, and those stand for all. The sum leaves out the average pool and the last
layer, which are the same in all. bf16 under autocast, fp32 master weights, channels-last.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must be set before a kernel module is imported

import torch  # noqa: E402

from bench import count_eager, count_inductor, count_triton  # noqa: E402
from bench.blocks import Part, fused, parts_of, train  # noqa: E402
from bench.count_saved import saved_bytes  # noqa: E402
from bench.counted import NETWORKS  # noqa: E402
from bench.record import write_results  # noqa: E402
from fastres.nn.blocks import LONGEST  # noqa: E402

Figures = dict[str, float]
MOST = 20  # blocks of a stage that are all counted


class StepTraffic(NamedTuple):
    """The training step of a part of a network; bytes."""

    part: Part
    eager: list[count_eager.CallTraffic]
    compiled: list[count_eager.CallTraffic]
    launches: list[count_triton.LaunchTraffic]  # of the fused step
    other: list[count_eager.CallTraffic]  # of the fused step: casts of weights, concatenations
    saved: Figures  # "eager", "fused" and "recompute", the fused memory mode

    @property
    def moved(self) -> Figures:
        """Bytes loaded and stored: "eager", "compiled" and "fused"."""
        return {
            "eager": _sum(self.eager),
            "compiled": _sum(self.compiled),
            "fused": _sum(self.launches) + _sum(self.other),
        }


def _sum(kernels: list) -> int:
    return sum(kernel.loaded + kernel.stored for kernel in kernels)


def measure(part: Part, batch: int, dtype: torch.dtype = torch.bfloat16) -> StepTraffic:
    """Count a part's training step.

    Raises:
        RuntimeError: without ``TRITON_INTERPRET=1``.
    """
    module, x = fused(part), part.images(batch, dtype)
    launches = count_triton.traffic(lambda n: train(module, part.images(n, dtype), dtype), batch)
    with count_triton.unlaunched(), count_eager.EagerTraffic() as other:
        train(module, x, dtype)
    saved: dict[str, float] = {"eager": count_eager.saved(part.modules, x, dtype)}
    with count_triton.unlaunched():
        saved["fused"] = saved_bytes(module, x, dtype)
        saved["recompute"] = saved_bytes(fused(part, recompute=True), x, dtype)
    return StepTraffic(
        part,
        count_eager.traffic(part.modules, x, dtype),
        count_inductor.traffic(part.modules, x, dtype),
        launches,
        other.calls,
        saved,
    )


class Stage(NamedTuple):
    """The training step of a stage."""

    first: StepTraffic  # of its first block alone
    counted: StepTraffic  # of its first blocks, or of them all
    blocks: int

    @property
    def moved(self) -> Figures:
        """As `StepTraffic.moved`, of all blocks."""
        return self._all(self.first.moved, self.counted.moved)

    @property
    def saved(self) -> Figures:
        """As `StepTraffic.saved`, of all blocks."""
        return self._all(self.first.saved, self.counted.saved)

    def _all(self, first: Figures, counted: Figures) -> Figures:
        if self.blocks == self.counted.part.blocks:
            return counted
        further = each_further(first, counted, self.counted.part.blocks - 1)
        return {name: first[name] + (self.blocks - 1) * further[name] for name in first}


def measure_stage(stage: Part, batch: int) -> Stage:
    """Count a stage, see the module's docstring."""
    blocks = stage.blocks
    counted = measure(stage.first(blocks if blocks <= MOST else 1 + LONGEST), batch)
    return Stage(counted if blocks == 1 else measure(stage.first(), batch), counted, blocks)


COLUMNS = ("block", "blocks", "input", "eager MB", "compiled MB", "fused MB", "/ eager", "/ compiled",
           "saved MB, eager", "fused /", "memory mode /")  # fmt: skip


def rows(stages: list[Stage]) -> list[list[str]]:
    """Rows of `COLUMNS`: the first block of a stage, each further one, and all."""
    lines = []
    for stage in stages:
        first, further = stage.first, stage.blocks - 1
        channels, height, width = first.part.shape
        lines.append([first.part.name, "1", f"{height}x{width}x{channels}", *_cells(first.moved, first.saved)])
        if further:
            kinds = ((first.moved, stage.moved), (first.saved, stage.saved))
            each = _cells(*(each_further(*kind, further) for kind in kinds))
            channels, height, width = stage_output(stage.counted.part)
            lines.append([first.part.name[:-1] + "1", str(further), f"{height}x{width}x{channels}", *each])
    count = sum(stage.blocks for stage in stages)
    moved, saved = (_added([getattr(stage, kind) for stage in stages]) for kind in ("moved", "saved"))
    return [*lines, ["all", str(count), "", *_cells(moved, saved)]]


def each_further(first: Figures, whole: Figures, further: int) -> Figures:
    """What each of a stage's further blocks adds to the first."""
    return {name: (whole[name] - first[name]) / further for name in whole}


def stage_output(stage: Part) -> tuple[int, int, int]:
    """C, H, W of a stage's result."""
    with torch.no_grad():
        out = copy.deepcopy(stage.modules).to("meta")(torch.empty(1, *stage.shape, device="meta"))
    return tuple(out.shape[1:])


def _added(figures: list[Figures]) -> Figures:
    return {name: sum(one[name] for one in figures) for name in figures[0]}


def _cells(moved: Figures, saved: Figures) -> list[str]:
    eager, compiled, ours = moved["eager"], moved["compiled"], moved["fused"]
    kept = saved["eager"]
    return [
        *(f"{value / 1e6:.0f}" for value in (eager, compiled, ours)),
        f"{ours / eager:.2f}",
        f"{ours / compiled:.2f}",
        f"{kept / 1e6:.0f}",
        *(f"{saved[kind] / kept:.2f}" if kept else "" for kind in ("fused", "recompute")),
    ]


LAUNCH_COLUMNS = ("launch", "loads MB", "stores MB", "each tensor once MB", "issued MB", "tile")


def launch_rows(one: StepTraffic) -> list[list[str]]:
    """A row of `LAUNCH_COLUMNS` a launch, and one for the rest."""
    lines = []
    for launch in one.launches:
        figures = (launch.loaded, launch.stored, launch.least, launch.issued)
        tile = "x".join(map(str, launch.tile.values()))
        lines.append([launch.kernel.removesuffix("_kernel"), *(f"{value / 1e6:.2f}" for value in figures), tile])
    loaded, stored = (sum(getattr(call, kind) for call in one.other) for kind in ("loaded", "stored"))
    return [*lines, [f"{len(one.other)} of ATen", f"{loaded / 1e6:.2f}", f"{stored / 1e6:.2f}", "", "", ""]]


def table(columns: tuple[str, ...], lines: list[list[str]], markdown: bool) -> str:
    """Lines under columns, aligned or as Markdown; all columns but the first to the right."""
    if markdown:
        rule = [":--"] + ["--:"] * (len(columns) - 1)
        return "\n".join("| " + " | ".join(line) + " |" for line in [columns, rule, *lines])
    widths = [max(map(len, column)) for column in zip(columns, *lines)]
    return "\n".join(
        "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths)))
        for line in [columns, *lines]
    )


def stage_record(stage: Stage) -> list[dict[str, Any]]:
    """The first block and all of them as JSON, of these the kernels of the first ``counted`` blocks."""
    figures = {"blocks": stage.blocks, "moved": stage.moved, "saved": stage.saved}
    counted = stage.counted.part.blocks
    return [as_record(stage.first), {**as_record(stage.counted), **figures, "counted": counted}]


def as_record(one: StepTraffic) -> dict[str, Any]:
    """The step as JSON."""
    return {
        "part": one.part.name,
        "blocks": one.part.blocks,
        "input": one.part.shape,
        "moved": one.moved,
        "saved": one.saved,
        "launches": [
            {"kernel": launch.kernel, "tile": launch.tile}
            | {name: getattr(launch, name) for name in ("loaded", "stored", "least", "issued", "flops")}
            for launch in one.launches
        ],
        **{
            name: [call._asdict() for call in calls]
            for name, calls in (("other", one.other), ("eager", one.eager), ("compiled", one.compiled))
        },
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.traffic", description=__doc__.split("\n\n")[0])
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=["resnet50"], help="(resnet50)")
    parser.add_argument("--part", nargs="+", metavar="NAME", help="only stages that begin so, as in layer1.0 (all)")
    parser.add_argument("--batch", type=int, help="images (the network's own: 256, or as its preset has it)")
    parser.add_argument("--launches", action="store_true", help="also a table of each block's launches")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Count and print."""
    options = parse(argv)
    torch.set_num_threads(1)
    results = {}
    for network in options.network:
        name, size, constructor, batch = NETWORKS[network]
        batch = options.batch or batch
        found = []
        for stage in parts_of(name, size, **constructor):
            if not options.part or stage.name in options.part:
                print(f"{network} {stage.name}", file=sys.stderr, flush=True)
                found.append(measure_stage(stage, batch))
        print(f"\n{network}, {batch} images of {size}x{size}\n")
        print(table(COLUMNS, rows(found), options.markdown))
        for measured in found if options.launches else ():
            print(f"\n{measured.counted.part.name} and the rest of its stage\n")
            print(table(LAUNCH_COLUMNS, launch_rows(measured.counted), options.markdown))
        stages = [stage_record(measured) for measured in found]
        counted = {"model": name, "image": size, "options": constructor, "batch": batch}
        results[network] = {**counted, "stages": stages}
    if options.json:
        write_results(options.json, {"dtype": "bfloat16", "networks": results})


if __name__ == "__main__":
    main()
