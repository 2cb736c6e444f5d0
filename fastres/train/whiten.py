"""Whitening first layer: fixed filters that decorrelate the pixels of a patch, from the training images.

The network then needs no steps to learn what is known of natural images before any label (Page 2019, "How to train
your ResNet", part 8). Filters are the eigenvectors of the patches' covariance over the roots of their eigenvalues, each
with both signs, so that ReLU loses nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastres.data import Dataset, normalise
from fastres.errors import FastresError
from fastres.reference.speed import WhiteningConv

IMAGES = 5000  # enough for the covariance: some 10^6 patches
EPSILON = 5e-4  # keeps directions of nearly no variance from being blown up


def patch_covariance(images: Tensor, size: int) -> Tensor:
    """Second moments fp64 [C*size*size]^2 of all patches of images fp32 [N, C, H, W], which have mean 0 a channel."""
    dim, count = images.shape[1] * size * size, 0
    total = images.new_zeros(dim, dim, dtype=torch.float64)
    for part in images.split(500):  # a part's patches are size*size times as large as its images
        patches = part.unfold(2, size, 1).unfold(3, size, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, dim)
        total, count = total + (patches.T @ patches).double(), count + len(patches)
    return total / count


def whitening_filters(covariance: Tensor, count: int, epsilon: float = EPSILON) -> Tensor:
    """The ``count`` whitening directions of greatest variance, fp64 [count, dim], of a covariance [dim, dim]."""
    values, vectors = torch.linalg.eigh(covariance)  # ascending
    return (vectors / (values + epsilon).sqrt()).T.flip(0)[:count]


def sample_images(dataset: Dataset) -> Tensor:
    """Some `IMAGES` training images, normalised, fp32 [N, C, H, W]: a spread, as they may be sorted by class."""
    count = len(dataset.train)
    chosen = dataset.train.sample(torch.arange(0, count, max(1, count // IMAGES)))
    return normalise(chosen, dataset.mean, dataset.std)


@torch.no_grad()
def whiten(model: nn.Module, dataset: Dataset) -> None:
    """Give a network's whitening layer its filters and fix them; its bias stays trainable.

    Raises:
        FastresError: for a network without a `WhiteningConv`.
    """
    layer = next((module for module in model.modules() if isinstance(module, WhiteningConv)), None)
    if layer is None:
        raise FastresError("--whiten needs a network with a whitening layer: take --model speed, or add --no-whiten")
    outputs, channels, size, _ = layer.weight.shape
    covariance = patch_covariance(sample_images(dataset), size)
    filters = whitening_filters(covariance, outputs // 2).view(-1, channels, size, size).to(layer.weight)
    layer.weight.copy_(torch.cat([filters, -filters]))
    layer.weight.requires_grad = False
