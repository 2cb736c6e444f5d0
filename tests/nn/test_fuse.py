"""What is fused, what is left alone, and how that is said."""

import pytest
import torch
import torchvision
from torch import nn

import fastres.nn
from fastres.nn import fuse, unfuse
from fastres.nn.blocks import FusedBlock
from fastres.nn.networks import FusedNetwork
from fastres.reference.preact import PreActBottleneck, PreActResNet


def torchvision_network(**options):
    return torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=2, **options)


def test_grouped_and_unevenly_dilated_blocks_stay_eager_and_a_line_is_logged(caplog):
    model = fuse(torchvision_network(groups=32, width_per_group=4))
    (said,) = caplog.messages
    assert said.startswith(
        "ResNet: fused 0 of 4 blocks, 1 stem, 1 head; left layer1.0 and 3 more (a convolution has groups=32"
    )
    assert type(model.layer1[0]) is torchvision.models.resnet.Bottleneck
    model = torchvision_network()
    model.layer2[0].conv2 = nn.Conv2d(128, 128, 3, 2, (2, 1), (2, 1), bias=False)
    fuse(model)
    assert "dilation=(2, 1)" in caplog.messages[-1]
    assert isinstance(model.layer1[0], FusedBlock) and not isinstance(model.layer2[0], FusedBlock)
    x = torch.randn(2, 3, 64, 64)
    eager = unfuse(model.eval())(x)
    torch.testing.assert_close(fuse(model)(x), eager)


def test_other_norms_and_activations_stay_eager():
    with pytest.raises(ValueError, match="InstanceNorm2d is not nn.BatchNorm2d"):
        fuse(torchvision.models.resnet.Bottleneck(16, 4, norm_layer=nn.InstanceNorm2d))
    block = torchvision.models.resnet.Bottleneck(16, 4)
    block.relu = nn.SiLU()
    with pytest.raises(ValueError, match="SiLU is not nn.ReLU"):
        fuse(block)


def test_subclasses_keep_their_own_forward():
    class Own(torchvision.models.ResNet):
        def _forward_impl(self, x):
            return super()._forward_impl(x) + 1

    model = fuse(Own(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=2)).eval()
    assert type(model) is Own
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(x), unfuse(model)(x))


def test_networks_inside_other_modules_are_found():
    model = fuse(nn.ModuleDict({"trunk": torchvision_network(), "head": nn.Linear(2, 2)}))
    assert isinstance(model["trunk"].layer1[0], FusedBlock)


def test_one_eager_block_in_a_preactivation_network_leaves_the_others_fused(caplog):
    model = PreActResNet(20)
    model.layer2[0].conv2 = nn.Conv2d(32, 32, 3, 2, 1, groups=2, bias=False)
    fuse(model)
    assert "fused 5 of 6 blocks, 1 head; left layer2.0 (a convolution has groups=2)" in caplog.text
    assert type(model.layer2[0]) is PreActBottleneck and isinstance(model, FusedNetwork)
    x = torch.randn(2, 3, 16, 16)
    model.eval()
    torch.testing.assert_close(model(x), unfuse(model)(x))


def test_a_changed_head_is_respected():
    model = torchvision_network()
    model.avgpool = nn.AdaptiveMaxPool2d(1)
    report = str(fastres.nn.report(fuse(model.eval())))
    assert report == "ResNet: fused 4 of 4 blocks, 1 stem"
    x = torch.randn(2, 3, 40, 40)
    torch.testing.assert_close(model(x), unfuse(model)(x))


@pytest.mark.parametrize(
    "pool", [nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.MaxPool2d((3, 2), 2), nn.AvgPool2d(2)], ids=str
)
def test_any_other_pool_is_called(pool):
    model = torchvision_network()
    model.maxpool = pool
    model.eval()
    x = torch.randn(2, 3, 40, 40)
    expected = model(x)
    torch.testing.assert_close(fuse(model)(x), expected)


def test_nothing_to_fuse():
    with pytest.raises(ValueError, match="Linear has no block to fuse: fuse takes"):
        fuse(nn.Linear(2, 2))
