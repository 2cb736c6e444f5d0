"""Blocks, first layers and heads with GELU in place of ReLU: fused where its place is known, else called."""

import copy

import pytest
import torch
import torchvision
from support_libraries import library
from support_nets import assert_same, perturbed, train_step
from torch import nn

from fastres import ops
from fastres.export.portable import portable
from fastres.nn import Block, fold, fuse, register_block, report
from fastres.ops import cpu
from fastres.reference.speed import HalvingPool, SmoothBlock, SmoothWiden, SpeedResNet


class Unit(nn.Module):
    """conv-bn-gelu, conv-bn, a shortcut perhaps, GELU perhaps."""

    def __init__(self, residual: bool, ends: bool, approximate: str = "none"):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.act, self.residual, self.ends = nn.GELU(approximate), residual, ends

    def forward(self, x):
        y = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        y = y + x if self.residual else y
        return self.act(y) if self.ends else y


def unit_structure(unit: Unit) -> Block:
    layers = [(unit.conv1, unit.bn1), (unit.conv2, unit.bn2)]
    return Block(layers, [unit.act], residual=unit.residual, relu=unit.ends)


register_block(Unit, unit_structure)


def images(channels: int = 8) -> torch.Tensor:
    torch.manual_seed(4)
    return torch.randn(2, channels, 10, 9, dtype=torch.float64)


def assert_is_what_it_was(eager: nn.Module, fused: nn.Module, x: torch.Tensor) -> None:
    assert_same(train_step(fused, x), train_step(eager, x), 1e-9)
    expected = eager.eval()(x)
    torch.testing.assert_close(fused.eval()(x), expected, rtol=1e-9, atol=1e-9)


def conv() -> nn.Conv2d:
    return nn.Conv2d(8, 8, 3, padding=1, bias=False)


@pytest.mark.parametrize(
    "residual, ends, approximate, reason",
    [
        (True, False, "none", None),
        (False, True, "none", None),
        (False, False, "none", None),
        (True, True, "none", None),
        (True, False, "tanh", "a GELU has approximate='tanh'"),
    ],
)
def test_blocks_of_ones_own(residual, ends, approximate, reason):
    eager = perturbed(nn.Sequential(Unit(True, False), Unit(residual, ends, approximate), Unit(False, True))).double()
    fused = fuse(copy.deepcopy(eager))
    assert report(fused).left == ({} if reason is None else {"1": reason})
    assert_is_what_it_was(eager, fused, images())
    torch.testing.assert_close(fold(eager)(images()), eager(images()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "change",
    [
        lambda unit: setattr(unit, "act", nn.SiLU()),
        lambda unit: unit.act.register_forward_hook(lambda module, args, out: 2 * out),
    ],
)
def test_what_is_changed_after_fuse_is_seen(change):
    eager = perturbed(Unit(True, False)).double()
    fused = fuse(copy.deepcopy(eager))
    for model in (eager, fused):
        change(model)
    assert report(fused).left
    assert_is_what_it_was(eager, fused, images())


@pytest.mark.parametrize(
    "layers, stems",
    [
        (lambda: [conv(), nn.BatchNorm2d(8), nn.GELU()], 1),
        (lambda: [conv(), nn.BatchNorm2d(8), nn.MaxPool2d(2), nn.GELU()], 1),
        (lambda: [conv(), nn.BatchNorm2d(8), nn.MaxPool2d(3, 2, 1), nn.GELU()], 1),
        (lambda: [conv(), nn.BatchNorm2d(8), nn.GELU(), nn.MaxPool2d(2)], 1),  # the pool is called: not monotone
        (lambda: [conv(), nn.BatchNorm2d(8), nn.MaxPool2d(2), nn.GELU("tanh")], 0),
        (lambda: [conv(), nn.BatchNorm2d(8), nn.MaxPool2d(2, ceil_mode=True), nn.GELU()], 0),
        (lambda: [conv(), nn.BatchNorm2d(8), HalvingPool(), nn.GELU()], 1),
    ],
)
def test_first_layers(layers, stems):
    torch.manual_seed(0)
    eager = perturbed(nn.Sequential(*layers())).double()
    if not stems:
        with pytest.raises(ValueError):
            fuse(copy.deepcopy(eager))
        return
    fused = fuse(copy.deepcopy(eager))
    assert report(fused).stems == stems
    assert_is_what_it_was(eager, fused, images())
    torch.testing.assert_close(fold(eager)(images()), eager(images()), rtol=1e-9, atol=1e-9)


def test_an_image_that_is_not_halved():
    eager = perturbed(SmoothWiden(8, 8)).double()
    assert_is_what_it_was(eager, fuse(copy.deepcopy(eager)), images()[:, :, :1])


def test_the_network_of_a_speed_run():
    torch.manual_seed(0)
    eager = perturbed(SpeedResNet(5, (8, 12, 16), stem=6, patch=2, stride=1, act="gelu")).double()
    fused = fuse(copy.deepcopy(eager), strict=True)
    assert sum(isinstance(module, SmoothBlock) for module in eager.modules()) == 3
    assert str(report(fused)) == "SpeedResNet: fused 3 of 3 blocks, 4 stems, 1 head"
    x = torch.randn(2, 3, 17, 16, dtype=torch.float64)
    assert_is_what_it_was(eager, fused, x)
    torch.testing.assert_close(fold(eager)(x), eager(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_folded_on_a_cpu(dtype):
    """Twice: the second call repeats what the first one prepared."""
    if reason := cpu.unavailable():
        pytest.skip(reason)
    torch.manual_seed(0)
    eager = perturbed(SpeedResNet(5, (16, 24), stem=8, patch=2, stride=1, act="gelu")).eval()
    x = torch.randn(4, 3, 17, 16).contiguous(memory_format=torch.channels_last)
    with ops.implementation("cpp"), torch.no_grad():
        folded = fold(eager).to(dtype, memory_format=torch.channels_last)
        for _ in range(2):
            tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-4
            torch.testing.assert_close(folded(x.to(dtype)).float(), eager(x), rtol=tolerance, atol=tolerance)


def test_exported_without_kernels():
    """What an export is made of: folded, in PyTorch's own operations."""
    torch.manual_seed(0)
    eager = perturbed(SpeedResNet(5, (8, 12), stem=6, patch=2, stride=1, act="gelu")).eval()
    x = torch.randn(2, 3, 17, 16)
    torch.testing.assert_close(portable(eager)(x), eager(x), rtol=1e-4, atol=1e-4)


def test_timm_with_gelu():
    """The pool of the stem comes behind GELU there, and is called."""
    made = library("timm").create_model("resnet18d", act_layer="gelu", num_classes=3)
    torch.manual_seed(0)
    eager = perturbed(made).double()
    fused = fuse(copy.deepcopy(eager), strict=True)
    assert report(fused).fused_blocks == 8 and report(fused).stems == 1
    assert_is_what_it_was(eager, fused, torch.randn(2, 3, 33, 32, dtype=torch.float64))


def test_torchvision_with_gelu():
    torch.manual_seed(0)
    eager = torchvision.models.resnet18(num_classes=3)
    for module in list(eager.modules()):
        if isinstance(getattr(module, "relu", None), nn.ReLU):
            module.relu = nn.GELU()
    eager = perturbed(eager).double()
    fused = fuse(copy.deepcopy(eager), strict=True)
    assert_is_what_it_was(eager, fused, torch.randn(2, 3, 33, 32, dtype=torch.float64))
    mixed = copy.deepcopy(eager).train()
    mixed.layer2[0].relu = nn.ReLU()
    assert report(fuse(copy.deepcopy(mixed))).fused_blocks == 8  # each block has one of its own
