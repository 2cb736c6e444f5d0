"""Batches whose images are mixed in pairs, with soft labels: MixUp and CutMix of torchvision."""

from __future__ import annotations

import torch
from torch import Tensor

from fastres.data.streams import seeded


def mix(images: Tensor, labels: Tensor, classes: int, mixup: float, cutmix: float, key: tuple) -> tuple[Tensor, Tensor]:
    """A batch mixed with itself, each image with the one before it.

    MixUp (Zhang et al. 2018, "mixup: Beyond Empirical Risk Minimization") adds whole images, CutMix (Yun et al. 2019,
    "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features") pastes a rectangle; where
    both are asked for, each batch has one of them.

    Args:
        images: [B, 3, H, W], normalised. labels: int64 [B].
        mixup, cutmix: alpha of the Beta distribution that shares are drawn from; 0: not done.
        key: see `fastres.data.streams.seeded`.

    Returns:
        images in channels_last memory format, and the classes' shares, float32 [B, classes].
    """
    from torchvision.transforms import v2  # a slow import that other runs do without

    kinds = [v2.MixUp(alpha=mixup, num_classes=classes)] if mixup else []
    kinds += [v2.CutMix(alpha=cutmix, num_classes=classes)] if cutmix else []
    with seeded(*key):
        kind = kinds[int(torch.randint(len(kinds), ()))]
        mixed, shares = kind(images, labels)
    return mixed.contiguous(memory_format=torch.channels_last), shares.float()
