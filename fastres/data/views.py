"""What one image shows in one epoch: torchvision's transforms of single images, for the workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastres.data import pixels
from fastres.data.augment import Augment
from fastres.data.dataset import Split
from fastres.data.files import FileSplit
from fastres.data.streams import VIEW, seeded

RATIO = (3 / 4, 4 / 3)  # of the sides of a random resized crop


class Views:
    """The training images of a split, each drawn anew in each epoch, the same for the same (seed, epoch, number).

    In this order: random resized crop, colour jitter, RandAugment or TrivialAugment, random erasing.

    Args:
        mean: of the pixels, on the scale 0..255: the colour of what is erased.
    """

    def __init__(self, split: Split | FileSplit, augment: Augment, mean: Sequence[float], seed: int):
        from torchvision.transforms import InterpolationMode, v2  # a slow import that other runs do without

        self.split, self.seed = split, seed
        self.size = (augment.resize, augment.resize) if augment.crop_scale and augment.resize else split.size
        self._crop = None
        if augment.crop_scale is not None:
            self._crop = v2.RandomResizedCrop(self.size, (augment.crop_scale, 1.0), RATIO)
        steps: list[Any] = []
        if augment.color_jitter:
            steps.append(v2.ColorJitter(*(augment.color_jitter,) * 3))
        bilinear = InterpolationMode.BILINEAR
        if augment.auto_augment == "rand":
            steps.append(v2.RandAugment(magnitude=augment.magnitude, interpolation=bilinear))
        if augment.auto_augment == "trivial":
            steps.append(v2.TrivialAugmentWide(interpolation=bilinear))
        self._steps = steps
        self._erase = None
        if augment.random_erasing:
            self._erase = v2.RandomErasing(augment.random_erasing, value=[round(value) for value in mean])

    def __call__(self, number: int, epoch: int) -> np.ndarray:
        """Image ``number`` in an epoch, uint8 [H, W, 3]; errors as of `FileSplit.open`."""
        with seeded(self.seed, VIEW, epoch, number):
            image = self._cropped(number)
            for step in self._steps:
                image = step(image)
            seen = np.asarray(image)
            if self._erase is None:
                return seen
            return self._erase(torch.from_numpy(seen.copy()).permute(2, 0, 1)).permute(1, 2, 0).numpy()

    def _cropped(self, number: int) -> Image.Image:
        if self._crop is None:
            return Image.fromarray(self.split.square(number))
        return pixels.resized_crop(self.split.open(number), self.size, self._pick)

    def _pick(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Left, top, width and height of a random part of an image."""
        assert self._crop is not None
        drawn = self._crop.make_params([torch.empty(3, height, width, device="meta")])
        return drawn["left"], drawn["top"], drawn["width"], drawn["height"]
