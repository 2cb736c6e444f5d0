"""Images/s and memory of a training step against batch, depth and resolution: ``python -m bench.growth``.

Eager and fused networks alike, each point in a process of its own, so that its peak memory is its own; the two are
timed side by side in a further process, in turn. The picture has the result file's name with the suffix ``.png``.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.depth import in_own_process
from bench.record import RESULTS, write_results
from bench.tables import markdown
from fastres.atomic import atomic_write
from fastres.measure import Workload, all_of, interleaved
from fastres.measure.command import device_name
from fastres.measure.step import Step, peak_memory
from fastres.train import machine

VARIANTS = ("eager", "fused")
AXES = {"batch": "images a step", "resolution": "pixels a side", "depth": "layers"}


def points(args: argparse.Namespace) -> list[tuple[str, int, Workload]]:
    """(axis, its value, workload) of every point: the CIFAR networks of He et al. 2015."""
    return [
        *(("batch", batch, Workload("resnet20", batch, 32)) for batch in args.batches),
        *(("resolution", size, Workload("resnet20", args.resolution_batch, size)) for size in args.resolutions),
        *(("depth", depth, Workload(f"resnet{depth}", args.depth_batch, 32)) for depth in args.depths),
    ]


def measure(workload: Workload, dtype: torch.dtype, rounds: int, threads: int) -> dict[str, Any]:
    """Seconds and images/s of a step and the memory that it adds, by variant."""
    device = machine.pick_device("auto")
    times = _run(device, _times, workload, dtype, rounds, threads)
    found = {}
    for variant in VARIANTS:
        memory = _run(device, _memory, workload, variant, dtype, threads)
        rate = workload.batch / times[variant]["median"]
        found[variant] = {"seconds": times[variant], "images_per_second": rate, **memory}
    return found


def _run(device: torch.device, function: Callable[..., Any], *arguments: Any) -> Any:
    return in_own_process(function, device, *arguments)


def _times(
    device: torch.device, workload: Workload, dtype: torch.dtype, rounds: int, threads: int
) -> dict[str, dict[str, Any]]:
    _prepare(device, threads)
    steps = {variant: Step(workload, variant, device, dtype) for variant in VARIANTS}
    found = all_of(interleaved(steps, device, warmup=1, rounds=rounds))
    return {variant: time._asdict() for variant, time in found.items()}


def _memory(
    device: torch.device, workload: Workload, variant: str, dtype: torch.dtype, threads: int
) -> dict[str, float]:
    _prepare(device, threads)
    return peak_memory(workload, variant, device, dtype, steps=2)


def _prepare(device: torch.device, threads: int) -> None:
    torch.set_num_threads(threads)
    if device.type == "cpu":
        machine.keep_freed_memory()


def plot(found: list[dict[str, Any]], path: Path, title: str) -> None:
    """A column an axis: images/s above, memory of a step below; one line a variant."""
    from matplotlib.figure import Figure

    shown = [axis for axis in AXES if any(one["axis"] == axis for one in found)]
    figure = Figure(figsize=(4 * len(shown), 6), layout="constrained")
    panels = figure.subplots(2, len(shown), squeeze=False)
    for column, axis in enumerate(shown):
        line = [one for one in found if one["axis"] == axis]
        x = [one["value"] for one in line]
        for variant, style in zip(VARIANTS, ("o-", "s-")):
            figures = [one["variants"][variant] for one in line]
            panels[0][column].loglog(x, [one["images_per_second"] for one in figures], style, label=variant)
            added = [one["peak_mib"] - one["idle_mib"] for one in figures]
            panels[1][column].loglog(x, added, style, label=variant)
        panels[1][column].set(xlabel=AXES[axis])
        for row in range(2):
            panels[row][column].grid(alpha=0.3, which="both")
    panels[0][0].set_ylabel("images/s")
    panels[1][0].set_ylabel("MiB that a step adds")
    panels[0][0].legend()
    figure.suptitle(title, fontsize=10)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)


COLUMNS = ("", "images/s, eager", "fused", "fused / eager", "MiB a step, eager", "fused", "fused / eager")


def rows(found: list[dict[str, Any]]) -> list[list[str]]:
    """A row of `COLUMNS` a workload."""
    lines: list[list[str]] = []
    for one in {str(one["workload"]): one for one in found}.values():
        eager, fused = (one["variants"][variant] for variant in VARIANTS)
        rates = [figures["images_per_second"] for figures in (eager, fused)]
        added = [figures["peak_mib"] - figures["idle_mib"] for figures in (eager, fused)]
        name = f"{one['workload']['model']}, batch {one['workload']['batch']}, {one['workload']['image_size']} pixels"
        ratio = f"{added[1] / added[0]:.2f}" if added[0] else ""
        lines.append(
            [
                name,
                *(f"{r:.3g}" for r in rates),
                f"{rates[1] / rates[0]:.2f}",
                *(f"{a:.0f}" for a in added),
                ratio,
            ]
        )
    return lines


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.growth", description=__doc__.split("\n\n")[0])
    parser.add_argument("--batches", type=int, nargs="*", default=[8, 32, 128], help="of resnet20")
    parser.add_argument("--depths", type=int, nargs="*", default=[20, 56, 110, 1202], help="layers")
    parser.add_argument("--depth-batch", type=int, default=8, help="images a step at every depth")
    parser.add_argument("--resolutions", type=int, nargs="*", default=[16, 32, 64], help="of resnet20")
    parser.add_argument("--resolution-batch", type=int, default=32, help="images a step at every resolution")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each")
    parser.add_argument("--precision", choices=("auto", *machine.DTYPES), default="auto")
    parser.add_argument("--out", type=Path, default=RESULTS / "growth-cpu.json", help="result file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write the results and the picture."""
    args = parse(argv)
    device = machine.pick_device("auto")
    dtype = machine.pick_dtype(args.precision, device)
    name = str(dtype).removeprefix("torch.")
    found: list[dict[str, Any]] = []
    before = os.getloadavg()[0]
    for axis, value, workload in points(args):
        print(f"{axis} {value}", flush=True)
        same = next((one for one in found if one["workload"] == asdict(workload)), None)  # two axes may cross
        variants = same["variants"] if same else measure(workload, dtype, args.rounds, torch.get_num_threads())
        found.append({"axis": axis, "value": value, "workload": asdict(workload), "variants": variants})
        write_results(args.out, {"dtype": name, "load_average": before, "points": found})
    print(markdown(COLUMNS, rows(found)))
    plot(found, args.out.with_suffix(".png"), f"one training step, {name}, {device_name(device)}")


if __name__ == "__main__":
    main()
