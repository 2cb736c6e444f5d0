"""What a run prints: a table with a row an epoch."""

from __future__ import annotations

from typing import Any

# (heading, key of the row, format)
COLUMNS = (
    ("epoch", "epoch", "{:d}"),
    ("step", "step", "{:d}"),
    ("lr", "lr", "{:.2e}"),
    ("train loss", "train_loss", "{:.4f}"),
    ("train acc", "train_accuracy", "{:.2%}"),
    ("val loss", "val_loss", "{:.4f}"),
    ("val acc", "val_accuracy", "{:.2%}"),
    ("tta acc", "tta_accuracy", "{:.2%}"),
    ("skipped", "skipped_steps", "{:d}"),
    ("images/s", "images_per_second", "{:.0f}"),
    ("train s/batch", "train_seconds_per_batch", "{:.4f}"),
    ("val s/batch", "val_seconds_per_batch", "{:.4f}"),
    ("peak MiB", "peak_memory_mib", "{:.0f}"),
    ("seconds", "seconds", "{:.1f}"),
)
_WIDTH = 10


def rank(row: dict[str, Any]) -> tuple[float, float]:
    """Larger for the better of two epochs: by validation accuracy, and where that is the same by loss."""
    return row["val_accuracy"], -row["val_loss"]


def heading(tta: bool, scaled: bool) -> str:
    """The table's first line.

    Args:
        tta: with the accuracy over mirror images.
        scaled: with the steps that fp16's gradient scaler skipped.
    """
    return "  ".join(f"{name:>{max(_WIDTH, len(name))}}" for name, _, _ in _columns(tta, scaled))


def line(row: dict[str, Any], tta: bool, scaled: bool) -> str:
    """One epoch as a line of the table."""
    return "  ".join(f"{form.format(row[key]):>{max(_WIDTH, len(name))}}" for name, key, form in _columns(tta, scaled))


def _columns(tta: bool, scaled: bool) -> list[tuple[str, str, str]]:
    wanted = {"tta_accuracy": tta, "skipped_steps": scaled}
    return [column for column in COLUMNS if wanted.get(column[1], True)]
