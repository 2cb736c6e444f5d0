"""FlopCounterMode counts eager PyTorch's FLOPs."""

import pytest
import torch
from support_fused import leaves
from support_ops import CASES, DIFFERENTIABLE, arguments
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet

from fastres import nn as fused_nn


def flops(function, *values, backward=True):
    with FlopCounterMode(display=False) as counter:
        out = function(*values)
        if backward:
            out.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("alone", [None, "x", "weights"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_operations(name, alone):
    case = CASES[name]
    values = arguments(name, torch.float32)
    for tensor in leaves(*values):
        wanted = {None: True, "x": tensor is values[0], "weights": tensor.dim() < 4 or tensor is not values[0]}
        tensor.requires_grad_(wanted[alone])
    if not leaves(*values):
        return
    assert flops(case.fused, *values) == flops(case.eager, *values)
    with torch.no_grad():
        assert flops(case.fused, *values, backward=False) == flops(case.eager, *values, backward=False)


def network():
    torch.manual_seed(0)
    return resnet.ResNet(resnet.Bottleneck, [2, 1, 1, 1], num_classes=5)


@pytest.mark.parametrize("recompute", [False, True])
def test_training(recompute):
    x = torch.randn(2, 3, 32, 32)
    expected = flops(network(), x)
    assert expected > 0
    assert flops(fused_nn.fuse(network(), recompute=recompute), x) == expected


def test_folded():
    x = torch.randn(2, 3, 32, 32)
    expected = flops(network().eval(), x, backward=False)
    folded = fused_nn.fold(network())
    for _ in range(2):  # the second call finds the weights packed
        with torch.no_grad():
            assert flops(folded, x, backward=False) == expected
            folded(x)


def test_on_meta():
    with torch.device("meta"):
        x = torch.randn(2, 3, 32, 32)
        eager, fused = network(), fused_nn.fuse(network())
    assert flops(fused, x) == flops(eager, x)
