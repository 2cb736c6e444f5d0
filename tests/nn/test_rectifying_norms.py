"""timm's BatchNorm with an activation in it: fused where ReLU follows anyway, else called."""

import copy

import pytest
import torch
from support_libraries import library, timm
from support_nets import assert_same, perturbed, train_step
from torch import nn
from torchvision.models.resnet import BasicBlock

import fastres.nn
from fastres.nn import fold, fuse
from fastres.nn.report import survey


def norm(channels: int, **options) -> nn.Module:
    return library("timm.layers").BatchNormAct2d(channels, **options)


def stage(**options) -> nn.Module:
    """A block with a projection and one with the identity, as a stage of resnetv2."""
    torch.manual_seed(0)
    made = library("timm.models.resnetv2")
    layers = dict(conv_layer=library("timm.layers").create_conv2d, norm_layer=library("timm.layers").BatchNormAct2d)
    return perturbed(made.ResNetStage(8, 16, 2, 1, 2, **layers, **options)).double()


def images(channels: int = 8) -> torch.Tensor:
    torch.manual_seed(4)
    return torch.randn(2, channels, 9, 8, dtype=torch.float64)


def assert_is_what_it_was(eager: nn.Module, fused: nn.Module, x: torch.Tensor) -> None:
    """A training step, evaluation and, where something is fused, fold."""
    assert_same(train_step(fused, x), train_step(eager, x), 1e-10)
    expected = eager.eval()(x)
    torch.testing.assert_close(fused.eval()(x), expected, rtol=1e-9, atol=1e-9)
    if survey(eager, planned=True).found:
        torch.testing.assert_close(fold(eager)(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("basic", [False, True])
def test_preactivation_blocks(basic):
    eager = stage(**({"block_fn": library("timm.models.resnetv2").PreActBasic, "bottle_ratio": 1.0} if basic else {}))
    fused = fuse(copy.deepcopy(eager), strict=True)
    assert fastres.nn.report(fused).fused_blocks == 2
    assert_is_what_it_was(eager, fused, images())


@pytest.mark.parametrize("change, reason", [
    (lambda block: setattr(block.norm2, "act", nn.SiLU()), "SiLU is not nn.ReLU"),
    (lambda block: setattr(block.norm2, "act", nn.Identity()), "Identity is not nn.ReLU"),
    (lambda block: setattr(block.norm2, "drop", nn.Hardtanh()), "a Hardtanh stands in the block"),
    (lambda block: setattr(block.norm1, "forward", lambda x: 2 * x), "instance's forward"),
    (lambda block: setattr(block.downsample, "norm", norm(16).double()), "a BatchNormAct2d stands in the block"),
    (lambda block: setattr(block.downsample, "pool", nn.AvgPool2d(1)), None),  # which its forward does not call
    (
        lambda block: setattr(block, "downsample", nn.Conv2d(8, 16, 1, 2).double()),
        "Conv2d is not a module that only calls",
    ),
])  # fmt: skip
def test_what_is_changed_after_fuse_is_seen(change, reason):
    eager = stage()
    fused = fuse(copy.deepcopy(eager))
    for model in (eager, fused):
        torch.manual_seed(1)
        change(model.blocks[0])
    left = fastres.nn.report(fused).left
    assert (reason is None and left is not None) or reason in left["blocks.0"]
    assert_is_what_it_was(eager, fused, images())


def assert_hook_runs(eager, fused, part, x):
    """A hook on a part of the first block sees what it sees in eager, and what it makes of that counts."""
    seen = []
    for model in (fused, eager):
        hooked = model.blocks[0].get_submodule(part)
        hooked.register_forward_hook(lambda module, args, out: seen.append(out.detach().clone()) or 2 * out)
    assert_same(train_step(fused, x), train_step(eager, x), 1e-10)
    assert len(seen) == 2
    torch.testing.assert_close(*seen, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "part", ["norm1", "norm1.act", "norm2.drop", "downsample", "downsample.conv", "downsample.norm"]
)
def test_hooks_run(part):
    eager = stage()
    assert_hook_runs(eager, fuse(copy.deepcopy(eager)), part, images())


@pytest.mark.parametrize(
    "part", ["", "norm1", "norm1.act", "norm3", "norm3.act", "downsample", "downsample.pool", "downsample.norm"]
)
@pytest.mark.parametrize("avg_down", [False, True])
def test_post_activation_blocks(avg_down, part):
    """As they are, and with a hook on each part."""
    if part == "downsample.pool" and not avg_down:
        return
    eager, x = stage(block_fn=library("timm.models.resnetv2").Bottleneck, avg_down=avg_down), images()
    fused = fuse(copy.deepcopy(eager), strict=True)
    if not part:
        assert_is_what_it_was(eager, fused, x)
        return
    assert_hook_runs(eager, fused, part, x)


def stem(bias: bool = False, conv=nn.Conv2d, **options) -> nn.Module:
    torch.manual_seed(0)
    pool = nn.MaxPool2d(3, 2, 1)
    return perturbed(nn.Sequential(conv(3, 8, 3, bias=bias), norm(8, **options), pool, BasicBlock(8, 8))).double()


@pytest.mark.parametrize("options, stems", [
    ({}, 1), ({"bias": True}, 0), ({"act_layer": nn.SiLU}, 0), ({"apply_act": False}, 0), ({"inplace": False}, 1),
    ({"drop_layer": nn.Hardtanh}, 0), ({"drop_layer": nn.Identity}, 1),
])  # fmt: skip
def test_stems(options, stems):
    eager = stem(**options)
    found = survey(eager, planned=True)
    assert found.stems == stems
    assert not stems or not found.left
    assert_is_what_it_was(eager, fuse(copy.deepcopy(eager)), images(3))


@pytest.mark.parametrize("part", ["1", "1.act"])
def test_hooks_in_a_stem_run_once(part):
    eager, x, seen = stem(), images(3), []
    fused = fuse(copy.deepcopy(eager))
    for model in (fused, eager):
        model.get_submodule(part).register_forward_hook(lambda *_: seen.append(part))
    assert_same(train_step(fused, x), train_step(eager, x), 1e-10)
    assert seen == [part] * 2


def test_in_a_post_activation_block_it_may_not_be_the_last():
    """There its ReLU comes before the shortcut is added."""
    blocks = [perturbed(BasicBlock(8, 8)).double() for _ in range(3)]
    for block, name, options in zip(blocks, ("bn1", "bn2", "bn2"), ({}, {}, {"apply_act": False})):
        setattr(block, name, perturbed(norm(8, inplace=False, **options)).double())
        block.relu.inplace = False
    eager = nn.Sequential(*blocks)
    fused = fuse(copy.deepcopy(eager))
    assert list(fastres.nn.report(fused).left) == ["1"]
    expected = eager.eval()(images())  # its second block cannot be trained, as it adds the shortcut in place
    for model in (fused.eval(), fold(eager)):
        torch.testing.assert_close(model(images()), expected, rtol=1e-9, atol=1e-9)
    del eager[1], fused[1]
    assert_is_what_it_was(eager.train(), fused.train(), images())


@pytest.mark.parametrize("name", ["resnetv2_50", "resnetv2_50d"])
def test_timms_switches_after_fuse(name):
    eager, x = perturbed(timm(name)(small=True)).double(), torch.randn(2, 3, 40, 36, dtype=torch.float64)
    fused = fuse(copy.deepcopy(eager))
    for model in (eager, fused):
        torch.manual_seed(2)
        model.reset_classifier(4, global_pool="max")
        model.double()
        model.head.drop.p = 0.5
        model.set_grad_checkpointing(True)
    found = []
    for model in (fused, eager):
        torch.manual_seed(3)
        found.append({k: v for k, v in train_step(model, x).items() if "running" not in k and "tracked" not in k})
    assert_same(*found, 1e-8)


@pytest.mark.parametrize("change, reason", [
    (lambda model: setattr(model.norm, "act", nn.SiLU()), "SiLU is not nn.ReLU"),
    (lambda model: setattr(model.stem.norm2, "act", nn.SiLU()), "SiLU is not nn.ReLU"),
    (lambda model: model.stem.norm1.register_forward_hook(lambda *_: None), "a BatchNormAct2d has hooks"),
    (lambda model: model.norm.act.register_forward_hook(lambda *_: None), "a ReLU has hooks"),
])  # fmt: skip
def test_stem_and_head_of_resnetv2_say_why_they_are_left(change, reason):
    eager = perturbed(timm("resnetv2_50d", layers=(1, 1, 1, 2))()).double().eval()
    change(eager)
    fused, x = fuse(copy.deepcopy(eager)), torch.randn(1, 3, 40, 36, dtype=torch.float64)
    assert (
        reason in survey(eager, planned=True).left["ResNetV2"] and reason in fastres.nn.report(fused).left["ResNetV2"]
    )
    for model in (fused, fold(eager)):
        torch.testing.assert_close(model(x), eager(x), rtol=1e-9, atol=1e-9)
