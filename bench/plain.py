"""A training loop as it is mostly written: PIL images through torchvision transforms and a DataLoader, eager fp32.

What `bench.accuracy` compares with. It knows nothing of the project's loop, batches or evaluation.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms

from fastres.data import Dataset, Split

CPU = torch.device("cpu")


class Images(torch.utils.data.Dataset):
    """A split's images as torchvision's CIFAR10 yields them: from an array in memory through PIL."""

    def __init__(self, split: Split, transform: Callable):
        self.pixels, self.labels = split.images.permute(0, 2, 3, 1).numpy(), split.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def loaders(
    dataset: Dataset, batch_size: int, pad: int, padding_mode: str, workers: int, device: torch.device = CPU
) -> tuple[DataLoader, DataLoader]:
    """Training batches, shuffled, cropped and flipped, and test batches, in memory that ``device`` reads."""
    pinned = device.type == "cuda"
    mean, std = ([value / 255 for value in values] for values in (dataset.mean, dataset.std))
    size = dataset.train.size[-1]
    augment = [transforms.RandomCrop(size, pad, padding_mode=padding_mode), transforms.RandomHorizontalFlip()]
    to_tensor = [transforms.ToTensor(), transforms.Normalize(mean, std)]
    train, test = (
        Images(split, transforms.Compose(steps))
        for split, steps in ((dataset.train, augment + to_tensor), (dataset.test, to_tensor))
        if isinstance(split, Split)
    )
    return (
        DataLoader(train, batch_size, shuffle=True, num_workers=workers, drop_last=True, pin_memory=pinned),
        DataLoader(test, 500, num_workers=workers, pin_memory=pinned),
    )


def train(
    model: nn.Module,
    optimizer: Any,
    set_rate: Callable[[int], None],
    train_loader: DataLoader,
    test_loader: DataLoader,
    epochs: int,
    label_smoothing: float,
    target: float,
    limit: float,
) -> list[dict[str, float]]:
    """Train until an epoch's end finds the target accuracy, for ``epochs``, or for ``limit`` seconds of training.

    Args:
        model: trained on the device that it is on.
        set_rate: sets the learning rates of a step (from 0).

    Returns:
        A row an epoch, and one where the limit ended it: ``epoch``, ``step``, ``train_loss``, ``val_accuracy``, and
        ``train_seconds``, without validation.
    """
    rows, step, seconds = [], 0, 0.0
    device = next(model.parameters()).device
    for epoch in range(1, epochs + 1):
        model.train()
        loss_sum, steps, start = 0.0, 0, time.perf_counter()
        for images, labels in train_loader:
            set_rate(step)
            optimizer.zero_grad()
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            loss = F.cross_entropy(model(images), labels, label_smoothing=label_smoothing)
            loss.backward()
            optimizer.step()
            loss_sum, step, steps = loss_sum + loss.item(), step + 1, steps + 1
            if seconds + time.perf_counter() - start > limit:
                break
        seconds += time.perf_counter() - start
        accuracy = test(model, test_loader)
        row = {"epoch": epoch, "step": step, "train_loss": loss_sum / steps, "val_accuracy": accuracy}
        rows.append({**row, "train_seconds": seconds})
        if accuracy >= target or seconds > limit:
            break
    return rows


@torch.no_grad()
def test(model: nn.Module, loader: DataLoader) -> float:
    """Accuracy in [0, 1]."""
    model.eval()
    device = next(model.parameters()).device
    right, count = 0.0, 0
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        right, count = right + (model(images).argmax(1) == labels).sum().item(), count + len(labels)
    return right / count
