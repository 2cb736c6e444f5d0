"""What a run prints: a table with a row an epoch, in 80 columns."""

from __future__ import annotations

from typing import Any

WIDTH = 80  # of the terminals that need it most
# key of an epoch's row -> format
FORMS = {
    "epoch": "{:d}",
    "step": "{:d}",
    "lr": "{:.1e}",
    "train_loss": "{:.4f}",
    "train_accuracy": "{:.2%}",
    "val_loss": "{:.4f}",
    "val_accuracy": "{:.2%}",
    "tta_accuracy": "{:.2%}",
    "skipped_steps": "{:d}",
    "images_per_second": "{:.0f}",
    "train_seconds_per_batch": "{:.4f}",
    "val_seconds_per_batch": "{:.4f}",
    "peak_memory_mib": "{:.0f}",
    "train_seconds": "{:.1f}",
    "seconds": "{:.1f}",
}
# those that the table shows -> (heading, width); metrics.jsonl has all
COLUMNS = {
    "epoch": ("epoch", 5),
    "lr": ("lr", 7),
    "train_loss": ("loss", 7),
    "train_accuracy": ("acc", 7),
    "val_loss": ("val loss", 8),
    "val_accuracy": ("val acc", 7),
    "tta_accuracy": ("tta acc", 7),
    "skipped_steps": ("skipped", 7),
    "images_per_second": ("images/s", 8),
    "seconds": ("seconds", 7),
}


def rank(row: dict[str, Any]) -> tuple[float, float]:
    """Larger for the better of two epochs: by validation accuracy, and where that is the same by loss."""
    return row["val_accuracy"], -row["val_loss"]


def heading(tta: bool, scaled: bool) -> str:
    """The table's first line.

    Args:
        tta: with the accuracy over mirror images.
        scaled: with the steps that fp16's gradient scaler skipped.
    """
    return _joined({key: name for key, (name, _) in COLUMNS.items()}, tta, scaled)


def line(row: dict[str, Any], tta: bool, scaled: bool) -> str:
    """One epoch as a line of the table."""
    shown = {key for key in COLUMNS if row[key] is not None}
    return _joined({key: FORMS[key].format(row[key]) for key in shown}, tta, scaled)


def _joined(cells: dict[str, str], tta: bool, scaled: bool) -> str:
    wanted = {"tta_accuracy": tta, "skipped_steps": scaled}
    columns = {key: width for key, (_, width) in COLUMNS.items() if wanted.get(key, True)}
    gap = "  " if sum(columns.values()) + 2 * (len(columns) - 1) <= WIDTH else " "
    return gap.join(f"{cells.get(key, ''):>{width}}" for key, width in columns.items())
