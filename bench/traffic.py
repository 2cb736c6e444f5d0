"""Bytes that a training step of each block moves: eager PyTorch, torch.compile, fused: ``python -m bench.traffic``.

Nothing is timed and no GPU is needed. See `bench.count_triton`, `bench.count_eager` and `bench.count_inductor` for how
each is counted, `bench.count_saved` for the memory kept. Blocks are counted alone; a network's sum leaves out the
average pool and the last layer, which are the same in all. bf16 under autocast, fp32 master weights, channels-last.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TRITON_INTERPRET", "1")  # must be set before a kernel module is imported

import torch  # noqa: E402

from bench import count_eager, count_inductor, count_triton  # noqa: E402
from bench.blocks import Block, blocks_of, fused, train  # noqa: E402
from bench.count_saved import saved_bytes  # noqa: E402
from bench.record import write_results  # noqa: E402

# network: (its name for `create_model`, size of the images, options)
NETWORKS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "resnet50": ("resnet50", 224, {"num_classes": 1000}),
    "resnet18": ("resnet18", 224, {"num_classes": 1000}),
    "notebook": ("notebook", 96, {}),
    "preact_resnet164": ("preact_resnet164", 32, {}),
    "resnet20": ("resnet20", 32, {}),
}


class BlockTraffic(NamedTuple):
    """One block's training step; bytes."""

    block: Block
    eager: list[count_eager.CallTraffic]
    inductor: list[count_eager.CallTraffic]
    launches: list[count_triton.LaunchTraffic]
    other: list[count_eager.CallTraffic]  # of the fused step: casts of weights, running statistics
    saved: dict[str, int]  # by "eager", "fused" and "fewer", the fused memory mode

    @property
    def moved(self) -> dict[str, int]:
        """Bytes loaded and stored by "eager", "inductor" and "fused"."""
        return {
            "eager": _sum(self.eager),
            "inductor": _sum(self.inductor),
            "fused": _sum(self.launches) + _sum(self.other),
        }


def _sum(kernels: list) -> int:
    return sum(kernel.loaded + kernel.stored for kernel in kernels)


def measure(block: Block, batch: int, dtype: torch.dtype = torch.bfloat16) -> BlockTraffic:
    """Count a block's training step.

    Raises:
        RuntimeError: without ``TRITON_INTERPRET=1``.
    """
    module, x = fused(block), block.images(batch, dtype)
    launches = count_triton.traffic(lambda n: train(module, block.images(n, dtype), dtype), batch)
    with count_triton.unlaunched(), count_eager.EagerTraffic() as other:
        train(module, x, dtype)
    saved = {"eager": count_eager.saved(block.module, x, dtype)}
    with count_triton.unlaunched():
        saved["fused"] = saved_bytes(module, x, dtype)
        saved["fewer"] = saved_bytes(fused(block, "fewer"), x, dtype)
    return BlockTraffic(
        block,
        count_eager.traffic(block.module, x, dtype),
        count_inductor.traffic(block.module, x, dtype),
        launches,
        other.calls,
        saved,
    )


COLUMNS = ("block", "count", "input", "eager MB", "compiled MB", "fused MB", "/ eager", "/ compiled", "saved MB, eager",
           "fused /", "memory mode /")  # fmt: skip


def rows(found: list[BlockTraffic]) -> list[list[str]]:
    """A row of `COLUMNS` a block, and their sum."""
    total: dict[str, dict[str, int]] = {"moved": {}, "saved": {}}
    lines = []
    for one in found:
        channels, height, width = one.block.shape
        lines.append(
            [one.block.name, str(one.block.count), f"{height}x{width}x{channels}", *_figures(one.moved, one.saved)]
        )
        for kind, figures in (("moved", one.moved), ("saved", one.saved)):
            for name, value in figures.items():
                total[kind][name] = total[kind].get(name, 0) + value * one.block.count
    return [*lines, ["all", str(sum(one.block.count for one in found)), "", *_figures(**total)]]


def _figures(moved: dict[str, int], saved: dict[str, int]) -> list[str]:
    eager, compiled, ours = moved.values()
    kept, fused_kept, fewer_kept = saved.values()
    megabytes = [f"{value / 1e6:.0f}" for value in (eager, compiled, ours)]
    return [
        *megabytes,
        f"{ours / eager:.2f}",
        f"{ours / compiled:.2f}",
        f"{kept / 1e6:.0f}",
        f"{fused_kept / kept:.2f}",
        f"{fewer_kept / kept:.2f}",
    ]


LAUNCH_COLUMNS = ("launch", "loads MB", "stores MB", "each tensor once MB", "issued MB", "tile")


def launch_rows(one: BlockTraffic) -> list[list[str]]:
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


def as_record(one: BlockTraffic) -> dict[str, Any]:
    """The block as JSON."""
    return {
        "block": one.block.name,
        "count": one.block.count,
        "input": one.block.shape,
        "moved": one.moved,
        "saved": one.saved,
        "launches": [
            {"kernel": launch.kernel, "tile": launch.tile}
            | {name: getattr(launch, name) for name in ("loaded", "stored", "least", "issued")}
            for launch in one.launches
        ],
        **{
            name: [call._asdict() for call in calls]
            for name, calls in (("other", one.other), ("eager", one.eager), ("inductor", one.inductor))
        },
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.traffic", description=__doc__.split("\n\n")[0])
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=["resnet50"], help="(resnet50)")
    parser.add_argument("--block", nargs="+", metavar="NAME", help="only these, as in layer1.1 (all)")
    parser.add_argument("--batch", type=int, default=256, help="images (256)")
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
        name, size, constructor = NETWORKS[network]
        found = []
        for block in blocks_of(name, size, **constructor):
            if not options.block or block.name in options.block:
                print(f"{network} {block.name}", file=sys.stderr, flush=True)
                found.append(measure(block, options.batch))
        print(f"\n{network}, {options.batch} images of {size}x{size}\n")
        print(table(COLUMNS, rows(found), options.markdown))
        for one in found if options.launches else ():
            print(f"\n{one.block.name}\n\n{table(LAUNCH_COLUMNS, launch_rows(one), options.markdown)}")
        results[network] = {"image": size, "blocks": [as_record(one) for one in found]}
    if options.json:
        write_results(options.json, {"batch": options.batch, "dtype": "bfloat16", "networks": results})


if __name__ == "__main__":
    main()
