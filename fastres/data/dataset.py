"""What a source of images yields: two splits of labelled images and the statistics of the first."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
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

    ``digest`` is that of all pixels, labels and class names, made where it is not given: the same data has the same one
    under any name.

    ``val``: images that pick the best epoch, where ``test`` shall pick nothing; None: ``test`` picks.
    ``image_size``: pixels a side that the images are meant to be seen at, which may be more than are stored; None: any.
    """

    train: Split
    test: Split
    classes: tuple[str, ...]
    label: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    val: Split | None = None
    image_size: int | None = None
    digest: str = ""

    def __post_init__(self):
        if not self.digest:
            splits = [split for split in (self.train, self.test, self.val) if split is not None]
            object.__setattr__(self, "digest", content_digest(splits, self.classes))

    @property
    def validation(self) -> Split:
        """The split that is evaluated after each epoch."""
        return self.test if self.val is None else self.val


@dataclass(frozen=True)
class Parts:
    """What a source holds, as it was found: some of the splits "train", "val", "test" and "all", the first of which has
    the statistics ``mean`` and ``std``.

    ``bad``: number of each file that could not be read, counted through the splits, and why; it has no image here.
    ``genuine``: whether the checksums are those of the published set.
    """

    splits: dict[str, Split]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bad: tuple[tuple[int, str], ...] = ()
    genuine: bool = False


def make_parts(
    splits: dict[str, Split],
    classes: tuple[str, ...],
    bad: tuple[tuple[int, str], ...] = (),
    genuine: bool = False,
) -> Parts:
    """Parts with the statistics of the first one."""
    first = next(iter(splits.values()))
    return Parts(splits, classes, *channel_statistics(first.images), bad, genuine)


def content_digest(splits: Sequence[Split], classes: Sequence[str]) -> str:
    """SHA-256 of images, labels and class names: a quarter of a second for CIFAR-10."""
    digest = hashlib.sha256(repr(tuple(classes)).encode("utf-8", "surrogatepass"))
    for split in splits:
        digest.update(repr(tuple(split.images.shape)).encode())
        for tensor in (split.images.permute(0, 2, 3, 1), split.labels):
            digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def make_dataset(
    train: Split,
    test: Split,
    classes: tuple[str, ...],
    label: str,
    val: Split | None = None,
    image_size: int | None = None,
) -> Dataset:
    """A dataset with the statistics of its training images.

    Raises:
        DataError: for a label that has no class, or splits of several sizes.
    """
    for name, split in (("training", train), ("test", test), ("validation", test if val is None else val)):
        if split.images.shape[1:] != train.images.shape[1:]:
            raise DataError(
                f"{label}: {name} images have {list(split.images.shape[2:])} pixels, training images "
                f"{list(train.images.shape[2:])}: bring them to one size"
            )
        low, high = int(split.labels.min()), int(split.labels.max())
        if low < 0 or high >= len(classes):
            wrong = low if low < 0 else high
            raise DataError(f"{label}: {name} label {wrong} is outside 0..{len(classes) - 1}: correct the labels")
    return Dataset(train, test, tuple(classes), label, *channel_statistics(train.images), val, image_size)


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


def limit_split(split: Split, count: int | None, name: str, label: str) -> tuple[Split, str]:
    """At most ``count`` images of a split, drawn at random but always the same; the label says so."""
    if count is not None and count < 1:
        raise DataError(f"a limit of {count} {name} images leaves none: give at least 1")
    if count is None or count >= len(split):
        return split, label
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
    return split.subset(order[:count]), f"{label}, {count} of {len(split)} {name} images"


def limit(dataset: Dataset, train: int | None = None, test: int | None = None) -> Dataset:
    """At most ``train`` training images and ``test`` images of each other split, drawn as `limit_split` does."""
    train_split, label = limit_split(dataset.train, train, "train", dataset.label)
    test_split, label = limit_split(dataset.test, test, "test", label)
    val = dataset.val
    if val is not None:
        val, label = limit_split(val, test, "validation", label)
    if label == dataset.label:
        return dataset
    return make_dataset(train_split, test_split, dataset.classes, label, val, dataset.image_size)


def divide(split: Split, share: float, seed: int, classes: tuple[str, ...]) -> tuple[Split, Split]:
    """A split less a share of each class, and that share: drawn at random, the same for the same seed.

    Raises:
        DataError: for a share that is not between 0 and 1, or a class of one image, which cannot be on both sides.
    """
    if not 0 < share < 1:
        raise DataError(f"a share of {share:g} for validation is not between 0 and 1: give one such as 0.2")
    generator = torch.Generator().manual_seed(seed)
    rest, kept = [], []
    for label in split.labels.unique().tolist():
        of_class = (split.labels == label).nonzero()[:, 0]
        if len(of_class) < 2:
            raise DataError(f"class {classes[label]!r} has one image, which --val-share cannot divide: add some")
        order = of_class[torch.randperm(len(of_class), generator=generator)]
        count = min(max(1, round(share * len(of_class))), len(of_class) - 1)
        kept.append(order[:count])
        rest.append(order[count:])
    return tuple(split.subset(torch.cat(part).sort().values) for part in (rest, kept))  # type: ignore[return-value]
