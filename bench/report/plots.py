"""Pictures of a campaign's results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.report.common import Record, ceilings, machine_line, measured_cases, networks, read
from fastres.atomic import atomic_write


def plots(folder: Path) -> list[Path]:
    """Pictures of a campaign's networks, as far as it has them: speeds as bars, images/s against the batch."""
    record = read(folder / "models.json")
    cases = networks(record) if record else {}
    title = machine_line(record) if record else ""
    written = []
    single = {name: case for name, case in cases.items() if ", batch " not in name and "eager" in case["variants"]}
    if single:
        written.append(_draw(folder / "models.png", lambda figure: _bars(figure, single, title)))
    sweeps = {name: case for name, case in cases.items() if ", batch " in name}
    if sweeps:
        written.append(_draw(folder / "batches.png", lambda figure: _sweep(figure, sweeps, title)))
    limits = ceilings(folder)
    operations = read(folder / "parts.json")
    if operations and "copy" in limits:
        points = _points(measured_cases(operations))
        if points:
            line = machine_line(operations)
            written.append(_draw(folder / "roofline.png", lambda figure: _roof(figure, points, limits, line)))
    return written


def _draw(path: Path, draw: Callable[[Any], None]) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    draw(figure)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)
    return path


def _bars(figure: Any, cases: dict[str, Record], title: str) -> None:
    axes = figure.subplots()
    variants = list(dict.fromkeys(variant for case in cases.values() for variant in case["variants"]))
    width = 0.8 / len(variants)
    for place, variant in enumerate(variants):
        at, speed = [], []
        for index, case in enumerate(cases.values()):
            figures = case["variants"].get(variant, {})
            if "speed" in figures:
                at.append(index + place * width)
                speed.append(figures["speed"])
        axes.bar(at, speed, width, label=variant)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks([index + 0.4 - width / 2 for index in range(len(cases))])
    axes.set_xticklabels([f"{name}\nbatch {case['batch']}" for name, case in cases.items()], fontsize=7)
    axes.set(ylabel="speed, eager channels-last = 1")
    axes.set_title(title, fontsize=8)
    axes.legend(fontsize=7)


def _sweep(figure: Any, cases: dict[str, Record], title: str) -> None:
    axes = figure.subplots()
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for case in cases.values():
        for variant, figures in case["variants"].items():
            if "seconds" in figures:
                lines.setdefault((case["model"], variant), []).append((case["batch"], figures["images_per_second"]))
    for (model, variant), points in lines.items():
        axes.loglog(*zip(*sorted(points)), "o-", label=f"{model}, {variant}")
    axes.set(xlabel="batch", ylabel="images/s")
    axes.set_title(title, fontsize=8)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7)


def _points(cases: dict[str, Record]) -> dict[str, list[tuple[float, float]]]:
    """(FLOP a byte, TFLOP/s) of every operation with products, by implementation."""
    points: dict[str, list[tuple[float, float]]] = {}
    for case in cases.values():
        for call in case.get("calls", {}).values():
            for which, figures in call["candidates"].items():
                if call["flops"] and "tflops" in figures:
                    points.setdefault(which, []).append((call["flops"] / call["bytes"], figures["tflops"]))
    return points


def _roof(figure: Any, points: dict[str, list[tuple[float, float]]], limits: dict[str, float], title: str) -> None:
    axes = figure.subplots()
    every = [x for line in points.values() for x, _ in line]
    intensity = [min(every) / 2, max(every) * 2]
    intensity = [intensity[0] * (intensity[1] / intensity[0]) ** (step / 50) for step in range(51)]
    for dtype, rate in limits.items():
        if dtype != "copy":
            axes.loglog(
                intensity,
                [min(rate, x * limits["copy"] / 1e3) for x in intensity],
                label=f"measured roof, {dtype}",
            )
    for (which, line), marker in zip(points.items(), "os^vD"):
        axes.loglog(*zip(*line), marker, label=which)
    axes.set(xlabel="FLOP a byte, each tensor once", ylabel="TFLOP/s")
    axes.set_title(title, fontsize=8)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7)
