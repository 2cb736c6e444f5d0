"""CIFAR networks of He et al. 2015: published sizes, option A shortcuts, plain twins."""

import pytest
import torch
from torch import nn

from fastres.reference.cifar import CifarResNet, PaddedShortcut, cifar_resnet

MILLIONS = {20: "0.27", 32: "0.46", 44: "0.66", 56: "0.85", 110: "1.7", 1202: "19.4"}  # the paper's table 6


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def expected_parameters(depth: int) -> int:
    """Counted from the paper's description: 6n + 2 layers of 16, 32, 64 channels, shortcuts without parameters."""
    n = (depth - 2) // 6
    widths = [16] * (2 * n + 1) + [32] * 2 * n + [64] * 2 * n
    kernels = sum(9 * a * b for a, b in zip([3, *widths], widths))
    return kernels + 2 * sum(widths) + 64 * 10 + 10


@pytest.mark.parametrize("depth, residual", [*((depth, True) for depth in MILLIONS), (20, False), (110, False)])
def test_published_sizes(depth, residual):
    with torch.device("meta"):
        model = cifar_resnet(depth, residual=residual)
    count = parameters(model)
    assert count == expected_parameters(depth)
    decimals = len(MILLIONS[depth].split(".")[1])
    assert f"{count / 1e6:.{decimals}f}" == MILLIONS[depth]
    layers = sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules())
    assert layers == depth


def test_stages_halve_the_image():
    model, shapes = cifar_resnet(20).eval(), []
    for stage in (model.layer1, model.layer2, model.layer3):
        stage[-1].register_forward_hook(lambda module, inputs, out: shapes.append(tuple(out.shape[1:])))
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert shapes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


def test_shortcut_keeps_every_second_pixel_and_adds_zero_channels():
    x = torch.randn(2, 3, 5, 6)
    y = PaddedShortcut(3, 7, 2)(x)
    assert y.shape == (2, 7, 3, 3)
    assert torch.equal(y[:, :3], x[:, :, 0::2, 0::2]) and not y[:, 3:].any()


@pytest.mark.parametrize("stage", [1, 2])
def test_a_block_is_its_shortcut_where_the_convolutions_give_nothing(stage):
    networks = {residual: CifarResNet(8, residual=residual).eval() for residual in (True, False)}
    blocks = {residual: getattr(network, f"layer{stage}")[0] for residual, network in networks.items()}
    x = torch.rand(2, blocks[True].conv1.in_channels, 6, 6)
    for block in blocks.values():
        nn.init.zeros_(block.bn2.weight)
    shortcut = x if stage == 1 else PaddedShortcut(16, 32, 2)(x)
    assert torch.equal(blocks[True](x), shortcut)
    assert not blocks[False](x).any()


@pytest.mark.parametrize("depth", [2, 7, 21])
def test_a_depth_that_does_not_exist(depth):
    with pytest.raises(ValueError, match=f"depth {depth} is not 6n"):
        cifar_resnet(depth)
