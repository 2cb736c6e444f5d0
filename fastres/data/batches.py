"""Batches of a split that lives on the training device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import overload

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
from fastres.data.dataset import DataError, Split, take_images

ORDER, CHOICES, FIRST_FLIPS = range(3)  # what a stream of random numbers is for


def stream(*key: int) -> torch.Generator:
    """A CPU generator whose seed is a hash of all integers of ``key`` (splitmix64, Steele et al. 2014)."""
    mask, state = (1 << 64) - 1, 0
    for value in key:
        state = (state + (value & mask) + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return torch.Generator().manual_seed(state >> 1)


class Batches:
    """Normalised batches; training batches are shuffled and augmented, test batches come in order and whole.

    The order is a function of (seed, epoch) and the augmentation of (seed, epoch, step), so a run that starts
    in the middle of an epoch sees the same batches, bit for bit, without doing the work of those before.

    Several ranks may share them: of each batch that one process would have, a rank yields every ``ranks``-th image, the
    same to the bit, so together they see each image once, their numbers of images differ by one at most, and
    micro-batches are of the same images too. A rank whose part of the last test batch is empty leaves it out.

    Args:
        split: images and labels; all of them are held on ``device``.
        batch_size: images a batch, of all ranks together.
        mean, std: per channel, on the scale 0..255.
        augment: see `Augment`; of test images only ``resize`` is done. None: nothing.
        train: whether these are training batches.
        dtype: of the images that are yielded.
        drop_last: leave out the last batch where it is smaller; default: when training, as batch statistics
            of a few images are poor.
        share: which rank of how many this one is.

    Raises:
        DataError: when the batch is larger than the split, the crop's padding does not fit the images, or a training
            batch has fewer images than there are ranks.
    """

    def __init__(
        self,
        split: Split,
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
    ):
        augment = augment or Augment(crop_pad=0)
        side = min(split.images.shape[-2:])
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
        self.split, self.batch_size = split.to(self.device), batch_size
        self.mean, self.std = tuple(mean), tuple(std)
        self.augment = augment if train else Augment(crop_pad=0, resize=augment.resize)
        self.train, self.seed, self.dtype = train, seed, dtype
        self._factors = normalisation(self.mean, self.std, dtype, self.device)
        self.drop_last = train if drop_last is None else drop_last
        self.rank, self.ranks = share
        rest = 0 if self.drop_last else len(split) % batch_size
        if train and min(batch_size, rest or batch_size) < self.ranks:
            raise DataError(
                f"a batch of {min(batch_size, rest or batch_size)} images leaves some of {self.ranks} ranks without one: "
                f"{'leave the last one out' if rest else 'make it larger'}"
            )
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
            images [B, 3, H, W] of ``dtype`` in channels_last memory format, and labels int64 [B].

        Raises:
            DataError: for a ``start_step`` that the epoch does not have.
        """
        if not 0 <= start_step <= len(self):
            raise DataError(f"step {start_step} is not in an epoch of {len(self)} batches: resume with the same data")
        return self._epoch(epoch, start_step, size_at)

    def _epoch(
        self, epoch: int, start_step: int, size_at: Callable[[int], int | None]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        count = len(self.split)
        order = torch.arange(count)
        if self.train:
            order = torch.randperm(count, generator=stream(self.seed, ORDER, epoch))
        on_device = self._send(order)
        for step in range(start_step, len(self)):
            first, last = step * self.batch_size, min((step + 1) * self.batch_size, count)
            part = slice(first + self.rank, last, self.ranks)
            if part.start >= last:
                continue
            draws = draw(self.augment, last - first, *self._size(), stream(self.seed, CHOICES, epoch, step))
            draws = draws.of(slice(self.rank, None, self.ranks))
            images = self._images(order[part], on_device[part], draws, epoch, size_at(step))
            yield images, self.split.labels[on_device[part]]

    def _size(self) -> tuple[int, int]:
        """Height and width of the images in the end."""
        height, width = self.split.images.shape[-2:]
        return (self.augment.resize, self.augment.resize) if self.augment.resize else (height, width)

    def _images(self, index: Tensor, index_on_device: Tensor, draws: Draws, epoch: int, size: int | None) -> Tensor:
        augment, images = self.augment, self.split.images
        height, width = self._size()
        mirror = draws.mirror if self._first_flips is None else self._first_flips[index] ^ bool(epoch % 2)
        if draws.top is None and mirror is None:
            images = take_images(images, index_on_device)
        else:
            corner = self._send(draws.top), self._send(draws.left)
            images = crop_and_flip(images, index_on_device, augment.crop_pad, *corner, self._send(mirror))
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
