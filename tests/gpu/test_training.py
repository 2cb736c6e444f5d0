"""Training on the compiled kernels: loss scaling in fp16, and fifty steps beside eager PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from support_curve import assert_within_eagers_own_spread, batch_of, learnable_images
from support_kernels import device
from support_nets import perturbed
from support_triton import fp32_products
from torch import nn

from fastres.nn import fuse
from fastres.reference.cifar import CifarResNet

pytestmark = pytest.mark.gpu


def test_training_curve_is_within_eagers_own_spread():
    with fp32_products():
        assert_within_eagers_own_spread(device())


def test_loss_scaling_in_fp16():
    """An overflow reaches the scaler through every kernel; once the scale has come down the loss falls."""
    images, labels = learnable_images(device())
    model = fuse(perturbed(CifarResNet(8, width=16))).to(device())
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    scaler = torch.amp.GradScaler(device().type, init_scale=2.0**40, growth_interval=1000)
    losses, scales = [], [scaler.get_scale()]
    while len(losses) < 50:
        before = [p.detach().clone() for p in model.parameters()]
        chosen = batch_of(len(losses), len(images))
        with torch.autocast(device().type, torch.float16):
            loss = F.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        skipped = scales[-1] < scales[-2]
        assert skipped == same(before, model)
        assert skipped or all(p.isfinite().all() for p in model.parameters())
        if skipped:
            assert len(scales) < 60
        else:
            losses.append(loss.item())
    assert scales[1] == scales[0] / 2
    assert all(buffer.isfinite().all() for buffer in model.buffers())
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def same(before: list[torch.Tensor], model: nn.Module) -> bool:
    """Whether no parameter has changed."""
    return all(map(torch.equal, before, (p.detach() for p in model.parameters())))
