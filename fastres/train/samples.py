"""Some images with what a network takes them for, as a picture."""

from __future__ import annotations

import io
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastres.data import Batches
from fastres.data.tree import plain
from fastres.train.machine import autocast

FILE = "predictions.png"
ROWS, COLUMNS = 4, 5
COUNT = ROWS * COLUMNS


@dataclass(frozen=True)
class Samples:
    """Images as they are seen, uint8 [N, H, W, 3], their labels, and the most probable class of each with its share."""

    images: Tensor
    labels: list[int]
    classes: list[int]
    shares: list[float]


def spread(count: int, number: int = COUNT) -> Tensor:
    """Numbers of images from all over a split of so many, int64: folders are in the order of their classes."""
    return torch.linspace(0, count - 1, min(count, number)).round().long()


@torch.inference_mode()
def predictions(model: nn.Module, batches: Batches, dtype: torch.dtype) -> Samples:
    """What a network in evaluation mode takes each image of the batches for."""
    device = next(model.parameters()).device
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (batches.mean, batches.std))
    pixels, labels, classes, shares = [], [], [], []
    for images, expected in batches.epoch(0):
        with autocast(device, dtype):
            best = model(images).float().softmax(1).max(1)
        pixels.append((images.float() * std + mean).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu())
        labels += expected.tolist()
        classes += best.indices.tolist()
        shares += best.values.tolist()
    return Samples(torch.cat(pixels), labels, classes, shares)


def picture(samples: Samples, names: list[str], title: str) -> bytes:
    """The images in a grid, each with its class and what it was taken for, as PNG."""
    from matplotlib.figure import Figure  # slow to import; no pyplot, so no global state and no display

    figure = Figure(figsize=(2 * COLUMNS, 2.3 * ROWS), layout="constrained")
    for axes in figure.subplots(ROWS, COLUMNS).flat:
        axes.set_axis_off()
    for axes, image, label, found, share in zip(
        figure.axes, samples.images.numpy(), samples.labels, samples.classes, samples.shares
    ):
        axes.imshow(image)
        text = f"{_short(names[found])} {share:.0%}" + ("" if found == label else f"\nis {_short(names[label])}")
        axes.set_title(text, fontsize=9, color="black" if found == label else "firebrick", parse_math=False)
    figure.suptitle(title.encode(errors="replace").decode(), parse_math=False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=90)
    return file.getvalue()


def _short(name: str) -> str:
    name = plain(name)
    return name if len(name) <= 20 else f"{name[:19]}…"
