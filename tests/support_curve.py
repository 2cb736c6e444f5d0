"""Fifty steps of training: a fused network stays as near to eager PyTorch as that does to itself, re-ordered."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.nn import fuse
from fastres.reference.cifar import CifarResNet

STEPS, BATCH = 50, 32


def learnable_images(device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """256 images [3, 12, 12] whose brightness tells the label, and labels 0 to 9."""
    images, labels = torch.randn(256, 3, 12, 12), torch.randint(10, (256,))
    images += labels.view(-1, 1, 1, 1) * 0.1
    return images.to(device), labels.to(device)


def batch_of(step: int, count: int) -> Tensor:
    """Indices of a step's images among ``count``."""
    return (torch.arange(BATCH) + step * BATCH) % count


def loss_curve(model: nn.Module, images: Tensor, labels: Tensor, order: Tensor) -> Tensor:
    """Losses of SGD with momentum; ``order`` re-orders the images of each batch, which only changes roundings."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    losses = []
    for step in range(STEPS):
        chosen = batch_of(step, len(images))[order]
        loss = F.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


def assert_within_eagers_own_spread(device: torch.device | None = None) -> None:
    """The fused curve is at most three times as far from an eager one as another order of the images puts it."""
    images, labels = learnable_images(device)
    start = CifarResNet(8, width=8).to(device)
    orders = [torch.arange(BATCH), *(torch.randperm(BATCH) for _ in range(4))]
    curves = [loss_curve(copy.deepcopy(start), images, labels, order) for order in orders]
    fused = loss_curve(fuse(copy.deepcopy(start)), images, labels, orders[0])
    assert fused[-10:].mean() < 0.8 * fused[:10].mean()
    for until in (10, 25, STEPS):
        spread = max((curve - curves[0])[:until].abs().max() for curve in curves[1:])
        assert (fused - curves[0])[:until].abs().max() <= 3 * spread
