"""Augmentation of whole batches on their device: no loop over images and no wait for the device.

The random choices are drawn on the CPU, a few numbers for an image, so that a CPU and a GPU run make the
same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.data.dataset import DataError

FLIPS = ("none", "random", "alternating")
AUTO = ("none", "rand", "trivial")
FRACTIONS = (
    ("crop_scale", 0.01, 1.0), ("color_jitter", 0.0, 1.0), ("magnitude", 0, 30), ("random_erasing", 0.0, 1.0),
    ("mixup", 0.0, 100.0), ("cutmix", 0.0, 100.0),
)  # fmt: skip


@dataclass(frozen=True)
class Augment:
    """What is done to training images, in this order.

    crop_pad: crop of the images' own size at a random place of the image, reflect-padded by so many pixels.
    flip: ``random`` mirrors each image with probability 1/2; ``alternating`` mirrors a random half in the
        first epoch and then each image in every other epoch (Jordan 2024, "94% on CIFAR-10 in 3.29 seconds").
    resize: side in pixels that every image is brought to, test images too; None leaves them.
    cutout: side of a square set to the mean, with its centre anywhere in the final image
        (DeVries & Taylor 2017).
    crop_scale: random resized crop (Szegedy et al. 2014) of at least this share of the image's area; None: none. It
        is of the whole photo where that is at hand, and takes the place of the padded crop.
    color_jitter: brightness, contrast and saturation change by up to this share.
    auto_augment: ``rand`` for RandAugment (Cubuk et al. 2019: two operations of strength ``magnitude``), ``trivial``
        for TrivialAugment (Mueller & Hutter 2021).
    random_erasing: probability that a rectangle is set to the mean (Zhong et al. 2017).
    mixup, cutmix: see `fastres.data.mixing.mix`.

    Cropping by scale, jitter, the two policies and erasing are torchvision's, done to each image by workers and first
    of all; MixUp and CutMix come last.

    Raises:
        DataError: for a value out of range.
    """

    crop_pad: int = 4
    flip: str = "none"
    cutout: int = 0
    resize: int | None = None
    crop_scale: float | None = None
    color_jitter: float = 0.0
    auto_augment: str = "none"
    magnitude: int = 9
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    @property
    def by_workers(self) -> bool:
        """Whether there is something to do to single images, before they make a batch."""
        return bool(self.crop_scale or self.color_jitter or self.auto_augment != "none" or self.random_erasing)

    def __post_init__(self):
        for name, low, high in FRACTIONS:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise DataError(f"{name} {value!r} is not between {low} and {high}")
        if self.auto_augment not in AUTO:
            raise DataError(f"auto_augment {self.auto_augment!r} is unknown: choose from {', '.join(AUTO)}")
        if self.crop_scale is not None and self.crop_pad:
            raise DataError(f"crop_scale {self.crop_scale} and crop_pad {self.crop_pad} are two crops: leave one out")
        for name, low in (("crop_pad", 0), ("cutout", 0), ("resize", 1)):
            value = getattr(self, name)
            if value is None and name == "resize":
                continue
            if not isinstance(value, int) or value < low:
                raise DataError(f"{name} {value!r} must be an integer of at least {low}")
        if self.flip not in FLIPS:
            raise DataError(f"flip {self.flip!r} is unknown: choose from {', '.join(FLIPS)}")


@dataclass(frozen=True)
class Draws:
    """The random choices for B images, each int64 [B] but ``mirror``, which is bool [B]; None: not asked for.

    ``top`` and ``left`` are the crop's corner in the padded image, 0..2*crop_pad. ``hole_y`` and ``hole_x``
    are the centre of the cut-out square. ``mirror`` is None for alternating flips, which are a matter of
    image and epoch.
    """

    top: Tensor | None
    left: Tensor | None
    mirror: Tensor | None
    hole_y: Tensor | None
    hole_x: Tensor | None

    def of(self, images: slice | Tensor) -> Draws:
        """Those for some of the images."""
        return Draws(*(None if choice is None else choice[images] for choice in vars(self).values()))


def draw(augment: Augment, count: int, height: int, width: int, generator: torch.Generator) -> Draws:
    """Choices for ``count`` images that will be ``height`` x ``width`` in the end, on the CPU."""

    def integers(wanted: bool, stop: int) -> Tensor | None:
        return torch.randint(stop, (count,), generator=generator) if wanted else None

    top = integers(augment.crop_pad > 0, 2 * augment.crop_pad + 1)
    left = integers(augment.crop_pad > 0, 2 * augment.crop_pad + 1)
    mirror = integers(augment.flip == "random", 2)
    hole_y = integers(augment.cutout > 0, height)
    hole_x = integers(augment.cutout > 0, width)
    return Draws(top, left, None if mirror is None else mirror.bool(), hole_y, hole_x)


def first_flips(count: int, generator: torch.Generator) -> Tensor:
    """Bool [count]: which images an alternating flip mirrors in even epochs; in odd ones, all others."""
    return torch.randint(2, (count,), generator=generator).bool()


def crop_and_flip(
    images: Tensor,
    index: Tensor,
    pad: int = 0,
    top: Tensor | None = None,
    left: Tensor | None = None,
    mirror: Tensor | None = None,
) -> Tensor:
    """Pick images, crop them out of their reflect-padded selves and mirror some, by one gather of pixels.

    Nothing is padded in memory: the reflection and the mirroring are in the pixels' numbers. A batch of uint8
    pixels is a quarter of its floats, which is why this comes before `normalise`.

    Args:
        images: uint8 [N, 3, H, W], channels_last. index: int64 [B], which of them.
        pad: pixels of padding on each side, less than H and W.
        top, left: int64 [B], corner in the padded image, 0..2*pad; None: no crop.
        mirror: bool [B], which of them are mirrored left to right after the crop; None: none.

    Returns:
        uint8 [B, 3, H, W], channels_last.
    """
    count, channels, height, width = images.shape
    # half the index's bytes, and the index is most of what the gather reads
    dtype = torch.int32 if images.numel() < 2**31 else torch.int64

    def axis(size: int, offset: Tensor | None, reverse: Tensor | None) -> Tensor:
        position = torch.arange(size, dtype=dtype, device=images.device)[None]
        if reverse is not None:
            position = torch.where(reverse[:, None], size - 1 - position, position)
        if offset is not None:
            position = (position + (offset.to(dtype)[:, None] - pad)).abs()
            position = (size - 1) - ((size - 1) - position).abs()
        return position

    rows, columns = axis(height, top, None), axis(width, left, mirror)
    pixel = ((index.to(dtype)[:, None] * height + rows) * width)[:, :, None] + columns[:, None, :]
    pixels = images.permute(0, 2, 3, 1).reshape(-1, channels)
    batch = pixels.index_select(0, pixel.flatten()).view(len(index), height, width, channels)
    return batch.permute(0, 3, 1, 2)


def normalisation(
    mean: Sequence[float], std: Sequence[float], dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """``normalise``'s factors and summands [2, 3, 1, 1], for a result of ``dtype``."""
    factors = [1 / s for s in std], [-m / s for m, s in zip(mean, std)]
    return torch.tensor(factors, dtype=_work(dtype)).to(device).view(2, -1, 1, 1)


def normalise(
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    factors: Tensor | None = None,
) -> Tensor:
    """``(images - mean) / std`` as one multiplication and one addition.

    Args:
        images: [B, 3, H, W] on the scale 0..255, of any dtype.
        mean, std: per channel, on the same scale.
        dtype: of the result; float64 is computed in float64, all others in float32.
        factors: `normalisation` of all these on the images' device, so that nothing is copied there.
    """
    scale, shift = normalisation(mean, std, dtype, images.device) if factors is None else factors
    return images.to(_work(dtype), copy=True).mul_(scale).add_(shift).to(dtype)


def _work(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def resize(images: Tensor, size: int) -> Tensor:
    """Bilinear resize of [B, 3, H, W] to ``size`` x ``size``, antialiased where it shrinks.

    Returns:
        float32 [B, 3, size, size], channels_last; ``images`` themselves if they have that size.
    """
    if images.shape[-2:] == (size, size):
        return images
    images = images.float()
    shrinks = size < max(images.shape[-2:])
    out = F.interpolate(images, (size, size), mode="bilinear", align_corners=False, antialias=shrinks)
    return out.contiguous(memory_format=torch.channels_last)


def shrink(images: Tensor, size: int) -> Tensor:
    """uint8 [B, 3, H, W] as uint8 [B, 3, size, size], bilinear and antialiased; see `resize`.

    A CPU computes in integers, a GPU in float32: pixels may differ by 1.
    """
    if images.shape[-2:] == (size, size):
        return images
    exact = images if images.device.type == "cpu" else images.float()
    out = F.interpolate(exact, (size, size), mode="bilinear", align_corners=False, antialias=True)
    return out.round().clamp_(0, 255).to(torch.uint8) if out.is_floating_point() else out


def cutout(images: Tensor, centre_y: Tensor, centre_x: Tensor, size: int) -> Tensor:
    """Set a ``size`` x ``size`` square of each image to 0, in place.

    The square of an image [3, H, W] has its centre at (centre_y, centre_x), int64 [B], covers ``size // 2``
    pixels before it, and what falls outside the image is lost.
    """

    def covered(length: int, centre: Tensor) -> Tensor:
        distance = torch.arange(length, device=images.device)[None] - (centre[:, None] - size // 2)
        return (distance >= 0) & (distance < size)

    rows, columns = covered(images.shape[2], centre_y), covered(images.shape[3], centre_x)
    return images.masked_fill_((rows[:, :, None] & columns[:, None, :])[:, None], 0)
