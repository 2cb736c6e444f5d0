"""What a source of images yields: two splits of labelled images and the statistics of the first."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastres.errors import FastresError


class DataError(FastresError):
    """Data that is missing, damaged or does not fit its use. The message is one line and names the remedy."""


def first_line(error: BaseException) -> str:
    """What an exception of another library says, as a part of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@dataclass(frozen=True)
class Split:
    """Labelled images.

    ``images``: uint8 [N, 3, H, W] in channels_last memory format. ``labels``: int64 [N].

    Raises:
        DataError: for another dtype or shape, or no image at all.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self):
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise DataError(f"images must be uint8 [N, 3, H, W], not {images.dtype} {list(images.shape)}")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise DataError(f"labels must be int64 [{len(images)}], not {labels.dtype} {list(labels.shape)}")
        if len(images) == 0:
            raise DataError("a split without an image: add images to it")
        if not images.is_contiguous(memory_format=torch.channels_last):
            object.__setattr__(self, "images", images.contiguous(memory_format=torch.channels_last))

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Split:
        """The same split on another device."""
        return Split(self.images.to(device), self.labels.to(device))

    def subset(self, index: Tensor) -> Split:
        """The images and labels at ``index``, int64 [M]."""
        return Split(take_images(self.images, index), self.labels[index])


@dataclass(frozen=True)
class Dataset:
    """Images to train and to test on.

    ``label`` says what an accuracy was reached on. ``mean`` and ``std`` are of the training images, per
    channel, on the pixels' scale 0..255; the std of a constant channel is given as 1, so that it is
    normalised to 0.
    """

    train: Split
    test: Split
    classes: tuple[str, ...]
    label: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


def make_dataset(train: Split, test: Split, classes: tuple[str, ...], label: str) -> Dataset:
    """A dataset with the statistics of its training images.

    Raises:
        DataError: for a label that has no class.
    """
    for name, split in (("training", train), ("test", test)):
        low, high = int(split.labels.min()), int(split.labels.max())
        if low < 0 or high >= len(classes):
            wrong = low if low < 0 else high
            raise DataError(
                f"{label}: {name} label {wrong} is outside 0..{len(classes) - 1}: correct the labels"
            )
    return Dataset(train, test, tuple(classes), label, *channel_statistics(train.images))


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and population standard deviation per channel, in float64, from the values' exact histograms."""
    values = torch.arange(256, dtype=torch.float64)
    means, stds = [], []
    for channel in range(images.shape[1]):
        counts = torch.bincount(images[:, channel].flatten(), minlength=256).cpu().double()
        mean = (counts * values).sum() / counts.sum()
        std = ((counts * (values - mean) ** 2).sum() / counts.sum()).sqrt()
        means.append(mean.item())
        stds.append(std.item() or 1.0)
    return tuple(means), tuple(stds)


def take_images(images: Tensor, index: Tensor) -> Tensor:
    """``images[index]`` for channels_last images [N, C, H, W] and int64 [M], kept channels_last."""
    return images.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)


def limit(dataset: Dataset, train: int | None = None, test: int | None = None) -> Dataset:
    """At most ``train`` and ``test`` images, drawn at random but always the same; the label says so."""
    label, splits = dataset.label, []
    for name, split, count in (("train", dataset.train, train), ("test", dataset.test, test)):
        if count is not None and count < 1:
            raise DataError(f"a limit of {count} {name} images leaves none: give at least 1")
        if count is not None and count < len(split):
            order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
            label += f", {count} of {len(split)} {name} images"
            split = split.subset(order[:count])
        splits.append(split)
    train_split, test_split = splits
    return make_dataset(train_split, test_split, dataset.classes, label)
