"""Batches of a split that lives on the training device, or is fed to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, overload

import torch
from torch import Tensor

from fastres.data.augment import (
    Augment,
    Draws,
    crop_and_flip,
    cutout,
    draw,
    first_flips,
    normalisation,
    normalise,
    resize,
    shrink,
)
from fastres.data.dataset import DataError, Labelled, Split, take_images
from fastres.data.feed import Feed, default_workers
from fastres.data.files import FileSplit
from fastres.data.mixing import mix, partners
from fastres.data.sampling import SAMPLINGS, balanced, shuffled
from fastres.data.streams import CHOICES, FIRST_FLIPS, MIX, ORDER, stream
from fastres.data.views import Views


class _Part(NamedTuple):
    """A rank's part of a batch.

    Attributes:
        places: in the batch of all ranks, of the images that are needed, in ascending order.
        pairs: int64 [B, 2], of mixed images: which of those are mixed in, and which they are mixed with.
    """

    places: slice | Tensor
    pairs: Tensor | None = None


class Batches:
    """Normalised batches; training batches are shuffled and augmented, test batches come in order and whole.

    The order is a function of (seed, epoch) and the augmentation of (seed, epoch, step), so a run that starts
    in the middle of an epoch sees the same batches, bit for bit, without doing the work of those before.

    Several ranks may share them: of each batch that one process would have, a rank yields every ``ranks``-th image, the
    same to the bit, so together they see each image once, their numbers of images differ by one at most, and
    micro-batches are of the same images too. Mixed images are mixed with the same ones on any number of ranks: where
    half a batch does not divide over them, a rank takes those of its pairs that are another's besides its own. A rank
    whose part of the last test batch is empty leaves it out.

    Images that are held on the device and those that worker processes feed to it make the same batches, bit for bit.

    Args:
        split: images and labels. A `Split` is held on ``device``, a `FileSplit` is decoded by workers as it is wanted.
        batch_size: images a batch, of all ranks together.
        mean, std: per channel, on the scale 0..255.
        augment: see `Augment`; of test images only ``resize`` is done. None: nothing.
        train: whether these are training batches.
        dtype: of the images that are yielded.
        drop_last: leave out the last batch where it is smaller; default: when training, as batch statistics
            of a few images are poor.
        share: which rank of how many this one is.
        workers: processes that decode; None: as many as `default_workers` says; 0: this one does it itself.
        sampling: of `fastres.data.sampling`.
        classes: number of classes, which mixed images need.
        resident: whether a `Split` is held on ``device``; else it stays where it is and workers feed it.

    Raises:
        DataError: when the batch is larger than the split, the crop's padding does not fit the images, or a training
            batch has fewer images than there are ranks.
    """

    def __init__(
        self,
        split: Labelled,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        augment: Augment | None = None,
        train: bool = True,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        drop_last: bool | None = None,
        share: tuple[int, int] = (0, 1),
        workers: int | None = None,
        resident: bool = True,
        sampling: str = "shuffle",
        classes: int | None = None,
    ):
        augment = augment or Augment(crop_pad=0)
        side = min(split.size)
        if batch_size < 1:
            raise DataError(f"batch size {batch_size} must be at least 1")
        if batch_size > len(split):
            raise DataError(
                f"batch size {batch_size} exceeds the {len(split)} images of the set: lower it to {len(split)} or less"
            )
        if train and augment.crop_pad >= side:
            raise DataError(
                f"crop_pad {augment.crop_pad} cannot be reflected in images of {side} pixels: lower it below {side}"
            )
        self.device = torch.device(device)
        self.batch_size = batch_size
        self.mean, self.std = tuple(mean), tuple(std)
        self.augment = augment if train else Augment(crop_pad=0, resize=augment.resize)
        self.train, self.seed, self.dtype = train, seed, dtype
        self._factors = normalisation(self.mean, self.std, dtype, self.device)
        self.drop_last = train if drop_last is None else drop_last
        self.rank, self.ranks = share
        rest = 0 if self.drop_last else len(split) % batch_size
        if train and min(batch_size, rest or batch_size) < self.ranks:
            raise DataError(
                f"a batch of {min(batch_size, rest or batch_size)} images leaves some of {self.ranks} ranks without "
                f"one: {'leave the last one out' if rest else 'make it larger'}"
            )
        self._host_labels = split.labels.cpu()
        self._feed: Feed | None = None
        self.sampling, self.classes = sampling, classes
        if sampling not in SAMPLINGS:
            raise DataError(f"sampling {sampling!r} is unknown: choose from {', '.join(SAMPLINGS)}")
        if (self.augment.mixup or self.augment.cutmix) and classes is None:
            raise DataError("mixed images have shares of classes as labels: give the number of classes")
        if resident and isinstance(split, Split) and not self.augment.by_workers:
            self.split: Split | FileSplit = split.to(self.device)
            self.labels = self.split.labels
        else:
            assert isinstance(split, (Split, FileSplit))
            self.labels = split.labels.to(self.device)
            workers = default_workers(self.device) if workers is None else workers
            self.split = split
            views = Views(split, self.augment, self.mean, seed) if self.augment.by_workers else None
            self._feed = Feed(split, self.device, workers, -(-batch_size // self.ranks), train, views)
        self._first_flips = None
        if self.augment.flip == "alternating":
            self._first_flips = first_flips(len(split), stream(seed, FIRST_FLIPS))

    def __len__(self) -> int:
        """Batches an epoch."""
        whole, rest = divmod(len(self.split), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def epoch(
        self, epoch: int, start_step: int = 0, size_at: Callable[[int], int | None] = lambda step: None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from ``start_step`` on.

        Args:
            size_at: of a step in the epoch, pixels a side that its images are brought to instead of their own size;
                the augmentation shrinks with them.

        Yields:
            images [B, 3, H, W] of ``dtype`` in channels_last memory format, and labels int64 [B]; of mixed images the
            classes' shares, float32 [B, classes].

        Raises:
            DataError: for a ``start_step`` that the epoch does not have.
        """
        if not 0 <= start_step <= len(self):
            raise DataError(f"step {start_step} is not in an epoch of {len(self)} batches: resume with the same data")
        return self._epoch(epoch, start_step, size_at)

    @property
    def waited(self) -> float:
        """Seconds for which fed images were not ready when they were wanted, since the beginning."""
        return self._feed.waited if self._feed is not None else 0.0

    def close(self) -> None:
        """End the worker processes, if there are any, until the next epoch."""
        if self._feed is not None:
            self._feed.close()

    def _epoch(
        self, epoch: int, start_step: int, size_at: Callable[[int], int | None]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        count = len(self.split)
        order = torch.arange(count)
        if self.train:
            kinds = {"shuffle": shuffled, "balanced": balanced}
            order = kinds[self.sampling](self._host_labels, stream(self.seed, ORDER, epoch))
        on_device = self._send(order)
        steps = range(start_step, len(self))
        ends = [(step * self.batch_size, min((step + 1) * self.batch_size, count)) for step in steps]
        parts = [self._part(last - first) for first, last in ends if first + self.rank < last]
        numbers = [order[first:last][part.places] for (first, last), part in zip(ends, parts)]
        for step, (first, last), part, wanted, images in zip(steps, ends, parts, numbers, self._pixels(epoch, numbers)):
            # where they are evenly spaced nothing is copied
            index = on_device[first:last][part.places] if isinstance(part.places, slice) else self._send(wanted)
            draws = draw(self.augment, last - first, *self._size(), stream(self.seed, CHOICES, epoch, step))
            draws = draws.of(part.places)
            mirror = draws.mirror if self._first_flips is None else self._first_flips[wanted] ^ bool(epoch % 2)
            picked = index if self._feed is None else None
            batch, labels = self._augmented(images, picked, draws, mirror, size_at(step)), self.labels[index]
            if part.pairs is not None:
                assert self.classes is not None
                pairs, key = self._send(part.pairs), (self.seed, MIX, epoch, step)
                batch, labels = mix(batch, labels, pairs, self.classes, self.augment.mixup, self.augment.cutmix, key)
            yield batch, labels

    def _part(self, count: int) -> _Part:
        """This rank's part of a batch of ``count`` images of all ranks."""
        own = slice(self.rank, count, self.ranks)
        if not (self.augment.mixup or self.augment.cutmix):
            return _Part(own)
        places = torch.arange(count)[own]
        needed, pairs = torch.stack([partners(places, count), places], 1).unique(return_inverse=True)
        return _Part(own if len(needed) == len(places) else needed, pairs)

    def _pixels(self, epoch: int, numbers: list[Tensor]) -> Iterator[Tensor]:
        """For each part, which are the ``numbers`` of its images, those that are fed; or all images of the split."""
        if self._feed is not None:
            yield from self._feed.batches(numbers, epoch)
        else:
            assert isinstance(self.split, Split)
            for _ in numbers:
                yield self.split.images

    def _size(self) -> tuple[int, int]:
        """Height and width of the images in the end."""
        return (self.augment.resize, self.augment.resize) if self.augment.resize else self.split.size

    def _augmented(
        self, images: Tensor, index: Tensor | None, draws: Draws, mirror: Tensor | None, size: int | None
    ) -> Tensor:
        augment = self.augment
        height, width = self._size()
        if draws.top is not None or mirror is not None:
            index = torch.arange(len(images), device=self.device) if index is None else index
            corner = self._send(draws.top), self._send(draws.left)
            images = crop_and_flip(images, index, augment.crop_pad, *corner, self._send(mirror))
        elif index is not None:
            images = take_images(images, index)
        if size is not None:
            images = shrink(images, size)
        elif augment.resize:
            images = resize(images, augment.resize)
        images = normalise(images, self.mean, self.std, self.dtype, self._factors)
        if draws.hole_y is not None and draws.hole_x is not None:
            centres = (self._send(draws.hole_y), height), (self._send(draws.hole_x), width)
            y, x = (centre * side // full for (centre, full), side in zip(centres, images.shape[-2:]))
            cutout(images, y, x, -(-augment.cutout * images.shape[-1] // width))
        return images

    @overload
    def _send(self, choices: Tensor) -> Tensor: ...

    @overload
    def _send(self, choices: None) -> None: ...

    def _send(self, choices: Tensor | None) -> Tensor | None:
        """Copy to the device without a wait for it."""
        if choices is None or self.device.type != "cuda":
            return choices
        return choices.pin_memory().to(self.device, non_blocking=True)
