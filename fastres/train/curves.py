"""Learning curves as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import IO, Any

_NEAR = 3  # epochs on either side that a bad one is told by
_WORSE = 4.0  # times their median
_WORSE_AT_FIRST = 100.0  # a first epoch is often many times as bad as the next ones, and no accident


def plot_curves(history: list[dict[str, Any]], label: str, file: IO[bytes]) -> None:
    """Draw loss and accuracy against the epoch, train and validation, as PNG.

    A bad epoch far off its neighbours leaves the axis to the others; a triangle with its value marks it at the edge.

    Args:
        history: rows with ``epoch``, ``train_loss``, ``val_loss``, ``train_accuracy``, ``val_accuracy``.
        label: title, which names the data.
    """
    from matplotlib.figure import Figure  # slow to import; no pyplot, so no global state and no display

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    epochs = [row["epoch"] for row in history]
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy")):
        lines = {part: [row[f"{part}_{name}"] for row in history] for part in ("train", "val")}
        for part, values in lines.items():
            axes.plot(epochs, values, marker=".", label=part)
        faults = [[value if name == "loss" else 1 - value for value in values] for values in lines.values()]
        if (limit := fault_limit(faults)) is not None:
            edge = limit if name == "loss" else 1 - limit
            best = min(fault for part in faults for fault in part)
            other = best - 0.05 * (limit - best)
            axes.set_ylim(*((other, edge) if name == "loss" else (edge, 1 - other)))
            for values, fault in zip(lines.values(), faults):
                for epoch, value in ((e, v) for e, v, f in zip(epochs, values, fault) if f > limit):
                    axes.plot(epoch, edge, marker="^" if name == "loss" else "v", color="firebrick", clip_on=False)
                    axes.annotate(f"{value:.3g}", (epoch, edge), fontsize=7, color="firebrick", ha="center")
        axes.set(xlabel="epoch", ylabel=name)
        axes.grid(alpha=0.3)
        axes.legend()
    # a $ begins no formula, and a byte that is no text has a shape too
    figure.suptitle(label.encode(errors="replace").decode(), parse_math=False)
    figure.savefig(file, format="png", dpi=120)


def fault_limit(lines: Sequence[Sequence[float]]) -> float | None:
    """Where an axis of losses, or of shares of errors, ends so that epochs far worse than those around them and than
    the first one are beyond it; None: there are none.
    """
    good: list[float] = []
    bad: list[float] = []
    for values in lines:
        for index, value in enumerate(values):
            near = [*values[max(0, index - _NEAR) : index], *values[index + 1 : index + 1 + _NEAR]]
            middle = statistics.median(near) if near else value
            is_bad = (value > _WORSE * middle and value > values[0]) or value > _WORSE_AT_FIRST * middle
            (bad if is_bad else good).append(value)
    if not bad or not good or max(good) <= 0:
        return None
    limit = max(good) * 1.1
    return limit if max(bad) > 2 * limit else None
