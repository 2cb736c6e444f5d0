"""Batches whose images are mixed in pairs, with soft labels: MixUp and CutMix of torchvision."""

from __future__ import annotations

import torch
from torch import Tensor

from fastres.data.dataset import take_images
from fastres.data.streams import seeded


def partners(positions: Tensor, count: int) -> Tensor:
    """With which image of a batch each is mixed: the one half a batch before it.

    So pairs do not depend on how many ranks share the batch; where half of it divides evenly over them, both images of
    a pair are on the same rank.

    Args:
        positions: int64 [B], places in the batch of all ranks. count: its images.
    """
    return (positions - count // 2) % count


def mix(
    images: Tensor, labels: Tensor, pairs: Tensor, classes: int, mixup: float, cutmix: float, key: tuple
) -> tuple[Tensor, Tensor]:
    """Some images of a batch, each mixed with another one.

    MixUp (Zhang et al. 2018, "mixup: Beyond Empirical Risk Minimization") adds whole images, CutMix (Yun et al. 2019,
    "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features") pastes a rectangle; where
    both are asked for, each batch has one of them.

    Args:
        images: [N, 3, H, W], normalised. labels: int64 [N].
        pairs: int64 [B, 2], which of them are mixed in, and which they are mixed with; on the images' device.
        mixup, cutmix: alpha of the Beta distribution that shares are drawn from; 0: not done.
        key: see `fastres.data.streams.seeded`.

    Returns:
        images in channels_last memory format, and the classes' shares, float32 [B, classes].
    """
    from torchvision.transforms import v2  # a slow import that other runs do without

    kinds = [v2.MixUp(alpha=mixup, num_classes=classes)] if mixup else []
    kinds += [v2.CutMix(alpha=cutmix, num_classes=classes)] if cutmix else []
    index = pairs.flatten()  # torchvision mixes each image with the one in front of it: every second one is wanted
    with seeded(*key):
        kind = kinds[int(torch.randint(len(kinds), ()))]
        mixed, shares = kind(take_images(images, index), labels[index])
    return mixed[1::2].contiguous(memory_format=torch.channels_last), shares[1::2].float()
