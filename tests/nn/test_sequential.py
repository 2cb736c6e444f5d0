"""``nn.Sequential`` slices of networks, and blocks of one's own."""

import copy

import pytest
import torch
import torchvision
from support_nets import assert_same, perturbed, train_step
from torch import nn

from fastres.nn import Block, Stages, fold, fuse, register_block, register_network, report, unfuse
from fastres.nn.networks import FusedNetwork
from fastres.reference.resnet import BasicBlock
from fastres.reference.speed import HalvingPool


def compare(eager, x, tolerance=1e-9):
    fused = fuse(copy.deepcopy(eager))
    assert_same(train_step(fused, x), train_step(eager, x), tolerance)
    eager.eval()
    with torch.no_grad():
        expected = eager(x)
        torch.testing.assert_close(fused.eval()(x), expected)
        folded = fold(eager)
        torch.testing.assert_close(folded(x), expected)
    names = [type(m) for m in eager.modules()]
    assert [type(m) for m in unfuse(fused).modules()] == names
    return folded


@pytest.mark.parametrize("until, blocks", [(4, 0), (5, 2), (8, 5), (9, 5), (10, 5)])
def test_slices_of_a_network(until, blocks):
    torch.manual_seed(0)
    network = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [2, 1, 1, 1], num_classes=3)
    children = list(perturbed(network).double().children())
    eager = nn.Sequential(*children[:until]) if until < 10 else nn.Sequential(*children[:9], nn.Flatten(), children[9])
    folded = compare(eager, torch.randn(2, 3, 33, 32).double())
    assert type(folded[0]).__name__ == "FoldedConv" and type(folded[1]) is nn.Identity
    head = ", 1 head" * (until > 8)
    assert str(report(fuse(eager))) == f"Sequential: fused {blocks} of {blocks} blocks, 1 stem{head}"


def test_runs_of_layers():
    torch.manual_seed(0)
    relu = nn.ReLU(inplace=True)
    eager = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), relu,
        nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), relu,
        nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
        nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 8, 1, bias=False), nn.Tanh(),
        nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8),
    ).double()  # fmt: skip
    x = torch.randn(2, 3, 17, 16).double()
    compare(eager, x)
    model = fuse(eager.train())
    assert set(report(model).left.values()) == {"a convolution has a bias; ReLU6 is not nn.ReLU"}
    assert isinstance(model[:6], FusedNetwork) and model[:6](x).shape == (2, 8, 9, 8)


def test_a_module_that_stands_in_two_places():
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(4, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4)
    block = BasicBlock(4, 4)
    eager = perturbed(nn.Sequential(conv, norm, nn.ReLU(), conv, norm, nn.ReLU(), block, block)).double()
    compare(eager, torch.randn(2, 4, 6, 6).double())


class Unit(nn.Module):
    """A block of another form: names, order of children, and a module that may do something."""

    def __init__(self, channels, drop=0.0):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, k, 1, k // 2, bias=False) for k in (3, 5))
        self.act, self.drop = nn.ReLU(), nn.Dropout(drop)

    def forward(self, features):
        y = self.act(self.norms[0](self.convs[0](features)))
        return self.act(self.drop(self.norms[1](self.convs[1](y))) + features)


class Tower(nn.Module):
    """A network of one's own."""

    def __init__(self, drop=0.0):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.norm, self.act = nn.BatchNorm2d(8), nn.ReLU()
        self.units = nn.ModuleList(Unit(8, drop) for _ in range(3))
        self.pool, self.last = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 2)

    def forward(self, images):
        x = self.act(self.norm(self.first(images)))
        for unit in self.units:
            x = unit(x)
        return self.last(self.pool(x)[:, :, 0, 0])


@pytest.fixture
def registered():
    register_block(Unit, lambda u: Block(list(zip(u.convs, u.norms)), [u.act], absent=[u.drop]))
    register_network(
        Tower,
        lambda t: [t.first, t.norm, t.act, Stages(t.units), t.pool, lambda x: x[:, :, 0, 0], t.last],
    )


def test_ones_own_blocks_and_networks(registered):
    torch.manual_seed(0)
    eager, x = perturbed(Tower()).double(), torch.randn(2, 3, 9, 8).double()
    compare(eager, x)
    fused = fuse(copy.deepcopy(eager), strict=True)
    assert str(report(fused)) == "Tower: fused 3 of 3 blocks, 1 stem, 1 head"
    fused.train().units[1].drop.p = 0.5
    assert report(fused).left == {"units.1": "Dropout is active"}
    x = x.contiguous(memory_format=torch.channels_last)  # random numbers come in the order of memory
    torch.manual_seed(1)
    ours = train_step(fused.train(), x)
    eager.units[1].drop.p = 0.5
    torch.manual_seed(1)
    assert_same(ours, train_step(eager.train(), x), 1e-9)
    assert not report(fused.eval()).left


def test_strict_raises_and_changes_nothing(registered):
    model = Tower(drop=0.1)
    with pytest.raises(
        ValueError, match="units.0 and 2 more .Dropout is active.; with strict=True nothing may be left"
    ):
        fuse(model, strict=True)
    assert type(model) is Tower


def test_what_has_no_adapter_is_reported():
    class Strange(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)

    left = report(fuse(nn.Sequential(BasicBlock(4, 4), Strange()))).left
    assert left == {"1": "Strange has no adapter: fastres.nn.register_block tells what it is made of"}
    with pytest.raises(ValueError, match="Strange has no block to fuse .*no adapter"):
        fuse(Strange())


@pytest.mark.parametrize("side", [2, 5])
def test_a_declared_pool_sees_the_size_behind_the_convolution(side):
    """`HalvingPool` leaves images of one pixel alone, which a strided convolution makes of two."""
    layers = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), HalvingPool()
    eager = perturbed(nn.Sequential(*layers)).double()
    fused, x = fuse(copy.deepcopy(eager)), torch.randn(4, 3, side, side, dtype=torch.float64)
    assert_same(train_step(fused, x), train_step(eager, x), 1e-9)
