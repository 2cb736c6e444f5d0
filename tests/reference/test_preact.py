"""Pre-activation networks of He et al. 2016: published sizes, the block's formula, plain twins."""

import pytest
import torch
import torch.nn.functional as F
from support_nets import perturbed
from torch import nn

from fastres.reference.preact import PreActBottleneck, PreActResNet, preact_resnet
from fastres.reference.resnet import conv1x1

MILLIONS = {164: "1.7", 1001: "10.2"}  # the paper's section 4


@pytest.mark.parametrize("depth", MILLIONS)
def test_published_sizes(depth):
    with torch.device("meta"):
        model = preact_resnet(depth)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    # the paper's figures leave out BatchNorm's vectors: 0.15 million in 1001 layers
    assert f"{sum(m.weight.numel() for m in layers.values()) / 1e6:.1f}" == MILLIONS[depth]
    assert sum("downsample" not in name for name in layers) == depth


def by_hand(block: PreActBottleneck, x: torch.Tensor) -> torch.Tensor:
    """The paper's figure 4(e), with functions only."""

    def activated(y, norm):
        mean, var = y.mean((0, 2, 3), keepdim=True), y.var((0, 2, 3), correction=0, keepdim=True)
        y = (y - mean) / (var + norm.eps).sqrt()
        return F.relu(y * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1))

    first = activated(x, block.bn1)
    y = F.conv2d(first, block.conv1.weight)
    y = F.conv2d(activated(y, block.bn2), block.conv2.weight, stride=block.conv2.stride, padding=1)
    y = F.conv2d(activated(y, block.bn3), block.conv3.weight)
    if not block.residual:
        return y
    if block.downsample is None:
        return x + y
    return F.conv2d(first, block.downsample.weight, stride=block.downsample.stride) + y


@pytest.mark.parametrize(
    "inputs, stride, projected, residual", [(16, 1, False, True), (8, 2, True, True), (16, 1, False, False)]
)
def test_block_formula(inputs, stride, projected, residual):
    torch.manual_seed(0)
    downsample = conv1x1(inputs, 16, stride) if projected else None
    block = perturbed(PreActBottleneck(inputs, 4, stride, downsample, residual)).double().train()
    x = torch.randn(3, inputs, 6, 6, dtype=torch.float64)
    kept = x.clone()
    torch.testing.assert_close(block(x), by_hand(block, x))
    assert torch.equal(x, kept)  # the in-place ReLU must not reach the input


def test_stages_halve_the_image_and_the_last_activation_comes_before_the_pool():
    model, shapes = PreActResNet(11).eval(), []
    for layer in (model.layer1[0], model.layer2[0], model.layer3[0], model.bn):
        layer.register_forward_hook(lambda module, inputs, out: shapes.append(tuple(out.shape[1:])))
    pooled = []
    model.avgpool.register_forward_pre_hook(lambda module, inputs: pooled.append(inputs[0]))
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 10)
    assert shapes == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (256, 8, 8)]
    assert pooled[0].min() == 0


@pytest.mark.parametrize("depth", [2, 10, 165])
def test_a_depth_that_does_not_exist(depth):
    with pytest.raises(ValueError, match=f"depth {depth} is not 9n"):
        preact_resnet(depth)
