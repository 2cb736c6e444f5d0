"""What torchvision's residual networks, and the backbones that it makes of them, are made of."""

from __future__ import annotations

from torchvision.models import resnet
from torchvision.models._utils import IntermediateLayerGetter

from fastres.nn.adapters.common import flatten, keeping_steps, residual_block, stem_steps
from fastres.nn.structure import Step, register_block, register_network


def resnet_steps(network: resnet.ResNet) -> list[Step]:
    """Of ``ResNet``."""
    stages: list[Step] = [network.layer1, network.layer2, network.layer3, network.layer4]
    return [*stem_steps(network), *stages, network.avgpool, flatten, network.fc]


def getter_steps(getter: IntermediateLayerGetter) -> list[Step]:
    """Of backbones of segmentation networks and detectors, which return what some of their modules give."""
    return keeping_steps(getter, getter.return_layers, lambda x: x, lambda kept: kept)


for _cls in (resnet.BasicBlock, resnet.Bottleneck):
    register_block(_cls, residual_block)
register_network(resnet.ResNet, resnet_steps)
register_network(IntermediateLayerGetter, getter_steps)
