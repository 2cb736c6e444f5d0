"""Fifty steps: a fused network stays as near to eager PyTorch as eager PyTorch does to itself, re-ordered."""

import copy

import torch
import torch.nn.functional as F

from fastres.nn import fuse
from fastres.reference.cifar import CifarResNet

STEPS, BATCH = 50, 32


def loss_curve(model, images, labels, order):
    """Losses of SGD with momentum; ``order`` re-orders the images of each batch, which only changes roundings."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    losses = []
    for step in range(STEPS):
        chosen = (torch.arange(BATCH) + step * BATCH) % len(images)
        chosen = chosen[order]
        loss = F.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


def test_training_curve_is_within_eagers_own_spread():
    images, labels = torch.randn(256, 3, 12, 12), torch.randint(10, (256,))
    images += labels.view(-1, 1, 1, 1) * 0.1
    start = CifarResNet(8, width=8)
    orders = [torch.arange(BATCH), *(torch.randperm(BATCH) for _ in range(4))]
    curves = [loss_curve(copy.deepcopy(start), images, labels, order) for order in orders]
    fused = loss_curve(fuse(copy.deepcopy(start)), images, labels, orders[0])
    assert fused[-10:].mean() < 0.8 * fused[:10].mean()
    for until in (10, 25, STEPS):
        spread = max((curve - curves[0])[:until].abs().max() for curve in curves[1:])
        assert (fused - curves[0])[:until].abs().max() <= 3 * spread
