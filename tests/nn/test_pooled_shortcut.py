"""Shortcuts of ResNet-D: what stands before the projection is called, the projection is an operation."""

import copy

import pytest
import torch
from support_nets import assert_same, perturbed, train_step
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastres.nn import fold, fuse
from fastres.nn.fold import FoldedConv
from fastres.reference.resnet import BasicBlock, Bottleneck, conv1x1

FRONTS = {
    "average": lambda: [nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)],
    "two": lambda: [nn.AvgPool2d(2, 2, ceil_mode=True), nn.Identity(), nn.Hardtanh()],
    "convolution": lambda: [conv1x1(8, 8, 2), nn.BatchNorm2d(8), nn.ReLU()],
}


def stage(front: str = "average", bottleneck: bool = False) -> nn.Sequential:
    """A block with such a shortcut and one with the identity."""
    torch.manual_seed(0)
    block, width, outputs = (Bottleneck, 3, 12) if bottleneck else (BasicBlock, 12, 12)
    shortcut = nn.Sequential(*FRONTS[front](), conv1x1(8, outputs, 1), nn.BatchNorm2d(outputs))
    blocks = nn.Sequential(block(8, width, 2, shortcut), block(outputs, width))
    return perturbed(blocks).double()


class Called(TorchDispatchMode):
    """Names of the operations that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize("bottleneck", [False, True])
def test_is_what_it_was(front, bottleneck, recompute):
    eager, x = stage(front, bottleneck), torch.randn(2, 8, 7, 6, dtype=torch.float64)
    fused = fuse(copy.deepcopy(eager), recompute=recompute, strict=True)
    assert_same(train_step(fused, x), train_step(eager, x), 1e-10)
    expected = eager.eval()(x)
    torch.testing.assert_close(fused.eval()(x), expected, rtol=1e-9, atol=1e-9)
    for folded in (fold(eager), fold(fused)):
        assert isinstance(folded[0].downsample[-1], FoldedConv)
        torch.testing.assert_close(folded(x), expected, rtol=1e-9, atol=1e-9)


def test_only_the_pool_is_called():
    fused = fuse(stage())
    with Called() as called:
        fused(torch.randn(2, 8, 7, 6, dtype=torch.float64)).sum().backward()
    assert called.names.count("aten::avg_pool2d") == 1
    assert called.names.count("fastres::fused_forward") == called.names.count("fastres::fused_backward") == 2
    assert not [name for name in called.names if "conv" in name or "batch_norm" in name]


@pytest.mark.parametrize("part", [0, 1, 2])
def test_hooks_on_each_part_run(part):
    eager, x, seen = stage(), torch.randn(2, 8, 7, 6, dtype=torch.float64), []
    fused = fuse(copy.deepcopy(eager))
    for one in (fused, eager):
        one[0].downsample[part].register_forward_hook(lambda module, args, out: seen.append(out.detach()) or 2 * out)
    assert_same(train_step(fused, x), train_step(eager, x), 1e-10)
    assert len(seen) == 2
    torch.testing.assert_close(*seen, rtol=1e-9, atol=1e-9)
