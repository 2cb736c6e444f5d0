"""What a source of images yields: two splits of labelled images and the statistics of the first."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastres.errors import FastresError


class DataError(FastresError):
    """Data that is missing, damaged or does not fit its use. The message is one line and names the remedy."""


def first_line(error: BaseException) -> str:
    """What an exception of another library says, as a part of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@dataclass(frozen=True)
class PixelFacts:
    """What identity and statistics need of N images' pixels, each image for itself, so that parts of a set have theirs.

    ``digests``: uint8 [N, 32], SHA-256 of the bytes of uint8 [H, W, 3]. ``sums``, ``squares``: int64 [N, 3], of each
    channel's values and of their squares.
    """

    digests: np.ndarray
    sums: np.ndarray
    squares: np.ndarray

    @classmethod
    def empty(cls, count: int) -> PixelFacts:
        """Room for those of ``count`` images."""
        return cls(np.zeros((count, 32), np.uint8), np.zeros((count, 3), np.int64), np.zeros((count, 3), np.int64))

    def note(self, number: int, image: np.ndarray) -> None:
        """Fill in those of uint8 [H, W, 3]."""
        self.digests[number] = np.frombuffer(image_digest(image), np.uint8)
        values = image.reshape(-1, image.shape[-1])
        self.sums[number] = values.sum(0, dtype=np.int64)
        self.squares[number] = np.square(values, dtype=np.uint16).sum(0, dtype=np.int64)  # 255 * 255 fits

    def subset(self, index: np.ndarray) -> PixelFacts:
        """Those of some of the images."""
        return PixelFacts(self.digests[index], self.sums[index], self.squares[index])


class Labelled(Protocol):
    """Labelled images of one size, wherever their pixels are: in memory (`Split`) or in their files (`FileSplit`).

    ``labels``: int64 [N]. ``size``: height and width of the images.
    """

    @property
    def labels(self) -> Tensor:  # noqa: D102
        ...

    @property
    def size(self) -> tuple[int, int]:  # noqa: D102
        ...

    def __len__(self) -> int: ...

    def subset(self, index: Tensor) -> Any:
        """The images and labels at ``index``, int64 [M]."""
        ...

    def labelled(self, labels: Tensor) -> Any:
        """The same images with other labels, int64 [N]."""
        ...

    def sample(self, index: Tensor) -> Tensor:
        """The images at ``index``, int64 [M], as uint8 [M, 3, H, W] in channels_last memory format."""
        ...

    def digests(self) -> np.ndarray:
        """See `PixelFacts`."""
        ...

    def sums(self) -> tuple[list[int], list[int]]:
        """Of each channel the sum of all values and of their squares."""
        ...


AnySplit = TypeVar("AnySplit", bound=Labelled)


@dataclass(frozen=True)
class Split:
    """Labelled images in memory.

    ``images``: uint8 [N, 3, H, W] in channels_last memory format. ``labels``: int64 [N]. ``kept``: the images'
    `digests`, where they are known, as from a cache file whose checksum was right; a dataset's splits have none, for
    its pixels may be changed in place.

    Raises:
        DataError: for another dtype or shape, or no image at all.
    """

    images: Tensor
    labels: Tensor
    kept: np.ndarray | None = field(default=None, repr=False, compare=False)

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

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.images.shape[2], self.images.shape[3]

    def to(self, device: torch.device | str) -> Split:
        """The same split on another device."""
        return Split(self.images.to(device), self.labels.to(device))

    def subset(self, index: Tensor) -> Split:
        """The images and labels at ``index``, int64 [M]."""
        kept = None if self.kept is None else self.kept[index.numpy()]
        return Split(take_images(self.images, index), self.labels[index], kept)

    def labelled(self, labels: Tensor) -> Split:
        """The same images with other labels, int64 [N]."""
        return Split(self.images, labels, self.kept)

    def sample(self, index: Tensor) -> Tensor:
        """The images at ``index``, int64 [M]."""
        return take_images(self.images, index)

    def square(self, number: int) -> np.ndarray:
        """An image as uint8 [H, W, 3]."""
        return self.images[number].permute(1, 2, 0).numpy()

    def open(self, number: int) -> Image.Image:
        """An image as Pillow's."""
        return Image.fromarray(self.square(number))

    def digests(self) -> np.ndarray:
        """See `PixelFacts`."""
        if self.kept is not None:
            return self.kept
        rows = self.images.permute(0, 2, 3, 1).cpu().contiguous().numpy()
        return np.frombuffer(b"".join(map(image_digest, rows)), np.uint8).reshape(-1, 32)

    def sums(self) -> tuple[list[int], list[int]]:
        """Of each channel the sum of all values and of their squares, exact, from the values' histograms."""
        sums, squares = [], []
        for channel in range(self.images.shape[1]):
            counts = torch.bincount(self.images[:, channel].flatten(), minlength=256).cpu().tolist()
            sums.append(sum(count * value for value, count in enumerate(counts)))
            squares.append(sum(count * value**2 for value, count in enumerate(counts)))
        return sums, squares


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
    ``center_share``: part of a photo's shorter side that its image has; None: the images are of no photos in files.
    """

    train: Labelled
    test: Labelled
    classes: tuple[str, ...]
    label: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    val: Labelled | None = None
    image_size: int | None = None
    digest: str = ""
    center_share: float | None = None

    def __post_init__(self):
        if not self.digest:
            splits = [split for split in (self.train, self.test, self.val) if split is not None]
            object.__setattr__(self, "digest", content_digest(splits, self.classes))

    def forgetting(self) -> Dataset:
        """The same, with splits that have no digests of their own any more."""
        val = None if self.val is None else _forgetting(self.val)
        return replace(self, train=_forgetting(self.train), test=_forgetting(self.test), val=val)

    @property
    def validation(self) -> Labelled:
        """The split that is evaluated after each epoch."""
        return self.test if self.val is None else self.val


def _forgetting(split: AnySplit) -> AnySplit:
    return replace(split, kept=None) if isinstance(split, Split) else split


@dataclass(frozen=True)
class Parts:
    """What a source holds, as it was found: some of the splits "train", "val", "test" and "all", the first of which has
    the statistics ``mean`` and ``std``.

    ``bad``: number of each file that could not be read, counted through the splits, and why; it has no image here.
    ``genuine``: whether the checksums are those of the published set.
    """

    splits: dict[str, Labelled]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bad: tuple[tuple[int, str], ...] = ()
    genuine: bool = False


def make_parts(
    splits: Mapping[str, Labelled],
    classes: tuple[str, ...],
    bad: tuple[tuple[int, str], ...] = (),
    genuine: bool = False,
) -> Parts:
    """Parts with the statistics of the first one."""
    first = next(iter(splits.values()))
    return Parts(dict(splits), classes, *statistics(first), bad, genuine)


def image_digest(image: np.ndarray) -> bytes:
    """SHA-256 of the bytes of uint8 [H, W, 3]."""
    return hashlib.sha256(np.ascontiguousarray(image).data).digest()


def content_digest(splits: Sequence[Labelled], classes: Sequence[str]) -> str:
    """SHA-256 of all images' digests, of the labels and of the class names."""
    digest = hashlib.sha256(repr(tuple(classes)).encode("utf-8", "surrogatepass"))
    for split in splits:
        digest.update(repr((len(split), *split.size)).encode())
        digest.update(split.digests().tobytes())
        digest.update(split.labels.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def make_dataset(
    train: Labelled,
    test: Labelled,
    classes: tuple[str, ...],
    label: str,
    val: Labelled | None = None,
    image_size: int | None = None,
) -> Dataset:
    """A dataset with the statistics of its training images.

    Raises:
        DataError: for a label that has no class, or splits of several sizes.
    """
    for name, split in (("training", train), ("test", test), ("validation", test if val is None else val)):
        if split.size != train.size:
            raise DataError(
                f"{label}: {name} images have {list(split.size)} pixels, training images {list(train.size)}: bring "
                "them to one size"
            )
        low, high = int(split.labels.min()), int(split.labels.max())
        if low < 0 or high >= len(classes):
            wrong = low if low < 0 else high
            raise DataError(f"{label}: {name} label {wrong} is outside 0..{len(classes) - 1}: correct the labels")
    return Dataset(train, test, tuple(classes), label, *statistics(train), val, image_size)


def statistics(split: Labelled) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and population standard deviation per channel, from exact sums: the same wherever the images are."""
    count = len(split) * split.size[0] * split.size[1]
    means, stds = [], []
    for total, square in zip(*split.sums()):
        means.append(total / count)
        variance = count * square - total**2  # times count**2, in integers of any size
        stds.append(math.sqrt(variance / count**2) or 1.0)
    return tuple(means), tuple(stds)


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """`statistics` of images uint8 [N, 3, H, W]."""
    return statistics(Split(images, torch.zeros(len(images), dtype=torch.int64)))


def take_images(images: Tensor, index: Tensor) -> Tensor:
    """``images[index]`` for channels_last images [N, C, H, W] and int64 [M], kept channels_last."""
    return images.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)


def limit_split(split: AnySplit, count: int | None, name: str, label: str) -> tuple[AnySplit, str]:
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
    limited = make_dataset(train_split, test_split, dataset.classes, label, val, dataset.image_size)
    return replace(limited, center_share=dataset.center_share)


def divide(split: AnySplit, share: float, seed: int, classes: tuple[str, ...]) -> tuple[AnySplit, AnySplit]:
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
