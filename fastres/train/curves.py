"""Learning curves as a picture."""

from __future__ import annotations

from typing import IO, Any


def plot_curves(history: list[dict[str, Any]], label: str, file: IO[bytes]) -> None:
    """Draw loss and accuracy against the epoch, train and validation, as PNG.

    Args:
        history: rows with ``epoch``, ``train_loss``, ``val_loss``, ``train_accuracy``, ``val_accuracy``.
        label: title, which names the data.
    """
    from matplotlib.figure import Figure  # slow to import; no pyplot, so no global state and no display

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    epochs = [row["epoch"] for row in history]
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy")):
        for part in ("train", "val"):
            axes.plot(epochs, [row[f"{part}_{name}"] for row in history], marker=".", label=part)
        axes.set(xlabel="epoch", ylabel=name)
        axes.grid(alpha=0.3)
        axes.legend()
    # a $ begins no formula, and a byte that is no text has a shape too
    figure.suptitle(label.encode(errors="replace").decode(), parse_math=False)
    figure.savefig(file, format="png", dpi=120)
