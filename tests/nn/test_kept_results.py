"""Containers that call a ResNet's modules in order and return some results: fused between them, and what they were."""

import copy
from collections import OrderedDict

import pytest
import torch
from support_libraries import library, timm
from support_nets import assert_same, perturbed, train_step
from torch import nn
from torchvision.models import ResNet, resnet
from torchvision.models._utils import IntermediateLayerGetter

import fastres.nn
from fastres.nn import fold, fuse, unfuse
from fastres.nn.fold import FoldedConv
from fastres.nn.networks import FusedNetwork


def getter(**kept) -> nn.Module:
    """torchvision's container around a small ResNet."""
    torch.manual_seed(0)
    network = ResNet(resnet.BasicBlock, [1, 2, 1, 1], num_classes=3)
    return perturbed(IntermediateLayerGetter(network, kept)).double()


def features(**options) -> nn.Module:
    """timm's."""
    torch.manual_seed(0)
    return perturbed(timm("resnet18", features_only=True, **options)(small=True)).double()


def dictionary() -> nn.Module:
    return features(feature_cls="dict")


def joined(model):
    """Its results in one vector."""

    def call(x):
        result = model(x)
        return torch.cat([y.flatten() for y in (result.values() if isinstance(result, dict) else result)])

    return call


def images() -> torch.Tensor:
    return torch.randn(2, 3, 40, 36, dtype=torch.float64)


CONTAINERS = {
    "stages": lambda: getter(layer2="a", layer4="b"),
    "all": lambda: getter(conv1="c", bn1="n", relu="r", maxpool="p", layer1="1", layer2="2"),
    "inside the stem": lambda: getter(bn1="n", layer1="1"),
    "in front of the pool": lambda: getter(relu="r", layer3="3"),
    "the head too": lambda: getter(layer1="1", avgpool="g"),
    "list": features,
    "some of a list": lambda: features(out_indices=(1, 3)),
    "dict": dictionary,
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_is_what_it_was(name):
    eager, x = CONTAINERS[name](), images()
    fused = fuse(copy.deepcopy(eager), strict=True)
    assert isinstance(fused, FusedNetwork) and fastres.nn.report(fused).stems == (
        name not in ("all", "inside the stem")
    )
    ours, theirs = fused(x), eager(x)
    assert type(ours) is type(theirs) and type(ours) in (OrderedDict, list)
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        ours, theirs = list(ours.values()), list(theirs.values())
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert_same(train_step(fused, x, joined(fused)), train_step(eager, x, joined(eager)), 1e-8)
    expected = joined(eager.eval())(x)
    folded = fold(eager)
    assert isinstance(folded.conv1, FoldedConv) == (name not in ("all", "inside the stem"))
    for model in (folded, fold(fused), fused.eval(), unfuse(copy.deepcopy(fused))):
        torch.testing.assert_close(joined(model)(x), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("build", [lambda: getter(layer1="1", layer4="4"), features])
@pytest.mark.parametrize("part", ["", "conv1", "bn1", "maxpool", "layer2", "layer2.1"])
def test_hooks_run(build, part):
    eager, x, seen = build(), images(), []
    fused = fuse(copy.deepcopy(eager))
    for model in (fused, eager):
        model.get_submodule(part).register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    assert_same(train_step(fused, x, joined(fused)), train_step(eager, x, joined(eager)), 1e-8)
    assert len(seen) == 2
    torch.testing.assert_close(*seen, rtol=1e-9, atol=1e-9)


OTHERS = {"maxpool": nn.AvgPool2d(2), "conv1": nn.Conv2d(3, 64, 5, 2), "layer3": nn.Identity()}


@pytest.mark.parametrize("part", OTHERS)
def test_replaced_parts_are_called(part):
    eager, x = getter(layer2="2", layer3="3"), images()
    fused = fuse(copy.deepcopy(eager))
    for model in (fused, eager):
        setattr(model, part, copy.deepcopy(OTHERS[part]).double())
        model.return_layers["layer1"] = "one"
    assert list(fused(x)) == list(eager(x)) == ["one", "2", "3"]
    assert_same(train_step(fused, x, joined(fused)), train_step(eager, x, joined(eager)), 1e-8)


@pytest.mark.parametrize("build", [features, dictionary])
def test_timms_checkpointing(build):
    eager, x = build(), images()
    fused = fuse(copy.deepcopy(eager))
    for model in (fused, eager):
        model.set_grad_checkpointing(True)
    ours, theirs = (train_step(model, x, joined(model)) for model in (fused, eager))
    unbuffered = [
        {k: v for k, v in found.items() if "running" not in k and "tracked" not in k} for found in (ours, theirs)
    ]
    assert_same(*unbuffered, 1e-8)


def test_a_forward_of_ones_own_is_kept():
    class Own(IntermediateLayerGetter):
        def forward(self, x):
            return {name: 2 * y for name, y in super().forward(x).items()}

    network = perturbed(ResNet(resnet.BasicBlock, [1, 1, 1, 1])).double().eval()
    model = fuse(Own(network, {"layer2": "2"}))
    assert type(model) is Own
    x = images()
    expected = unfuse(copy.deepcopy(model))(x)
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


def test_lists_of_tensors_between_timms_modules():
    """What a module gives as a list is concatenated, or its first is kept, as timm says."""

    class Twice(nn.Module):
        def forward(self, x):
            return [x, 2 * x]

    class First(nn.Module):
        def forward(self, xs):
            return xs[0]

    library("timm")
    for concat in (False, True):
        eager, x = features(out_indices=(0, 1)).eval(), images()
        eager.concat = concat
        eager.layer1 = nn.Sequential(eager.layer1, Twice())
        eager.tail = First()
        fused = fuse(copy.deepcopy(eager))
        torch.testing.assert_close(fused(x), eager(x), rtol=1e-9, atol=1e-9)
        assert fused(x)[1].shape[1] == 64 * (1 + concat)
