"""Which classes a network takes for which: the confusion matrix, and what follows from it, as CSV and PNG."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastres.atomic import atomic_write
from fastres.data import Batches
from fastres.data.tree import plain
from fastres.errors import FastresError
from fastres.train.machine import autocast

FILES = MATRIX, CLASSES, PICTURE = "confusion.csv", "classes.csv", "confusion.png"
NAMED = 40  # classes whose names still fit the picture


@dataclass(frozen=True)
class Confusion:
    """Images by class (row) and by the class they were taken for (column), int64 [C, C] on the CPU, and the share of
    them whose class was among the five most probable."""

    counts: Tensor
    top5: float

    @property
    def accuracy(self) -> float:
        """Share of all images that were taken for what they are."""
        return (self.counts.diagonal().sum() / self.counts.sum()).item()

    @property
    def per_class(self) -> list[float | None]:
        """The same of each class; None: it has no image."""
        totals = self.counts.sum(1).tolist()
        return [hits / total if total else None for hits, total in zip(self.counts.diagonal().tolist(), totals)]

    def line(self, names: list[str]) -> str:
        """Top-5 accuracy, where there are more classes, and the classes that were recognised least."""
        known = sorted((share, name) for share, name in zip(self.per_class, names) if share is not None)
        least = ", ".join(f"{plain(name)} {share:.1%}" for share, name in known[:3])
        return (f"top-5 {self.top5:.2%}; " if len(names) > 5 else "") + f"least: {least}"


@torch.inference_mode()
def confusion(model: nn.Module, batches: Batches, classes: int, dtype: torch.dtype) -> Confusion:
    """Count what a network in evaluation mode takes each image of the batches for."""
    device = next(model.parameters()).device
    counts = torch.zeros(classes * classes, dtype=torch.int64, device=device)
    top5 = torch.zeros((), dtype=torch.int64, device=device)
    for images, labels in batches.epoch(0):
        with autocast(device, dtype):
            logits = model(images).float()
        counts += torch.bincount(labels * classes + logits.argmax(1), minlength=classes * classes)
        top5 += (logits.topk(min(5, classes)).indices == labels[:, None]).sum()
    return Confusion(counts.view(classes, classes).cpu(), top5.item() / counts.sum().item())


def write_confusion(folder: Path, found: Confusion, names: list[str], title: str) -> None:
    """Write the matrix, the accuracy of each class, and a picture of the matrix in shares of its rows.

    Raises:
        FastresError: when the folder takes no more.
    """
    names = [plain(name) for name in names]
    rows: list[list] = [["class", *names]]
    rows += [[name, *row] for name, row in zip(names, found.counts.tolist())]
    totals = found.counts.sum(1).tolist()
    shares = [[name, total, "" if share is None else f"{share:.6f}"]
              for name, total, share in zip(names, totals, found.per_class)]  # fmt: skip
    contents = {
        MATRIX: _csv(rows),
        CLASSES: _csv([["class", "images", "accuracy"], *shares]),
        PICTURE: _picture(found.counts, names, title),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            with atomic_write(folder / name) as file:
                file.write(content)
    except OSError as error:
        raise FastresError(f"cannot write to {folder}: {error.strerror or error}; choose another folder") from error


def _csv(rows: list[list]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def _picture(counts: Tensor, names: list[str], title: str) -> bytes:
    from matplotlib.figure import Figure  # slow to import; no pyplot, so no global state and no display

    side = 4 + 0.25 * min(len(names), NAMED)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    figure.colorbar(axes.imshow(shares.numpy(), vmin=0, vmax=1, cmap="Blues"), label="share of the class")
    if len(names) <= NAMED:
        axes.set_xticks(range(len(names)), names, rotation=90, parse_math=False)
        axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set(xlabel="taken for", ylabel="class")
    axes.set_title(title, parse_math=False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()
