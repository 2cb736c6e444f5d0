"""What the blocks and networks of `fastres.reference` and torchvision are made of; the fused classes that have names.

Those of libraries that need not be there have modules of their own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet as torchvision_resnet
from torchvision.models._utils import IntermediateLayerGetter

from fastres.nn import blocks, networks  # noqa: F401  the fused forms
from fastres.nn.adapters import timm, transformers  # noqa: F401  known by the names of their classes
from fastres.nn.adapters.common import keeping_steps, numbered_layers
from fastres.nn.classes import fused_class
from fastres.nn.structure import Block, Stages, Step, register_block, register_network
from fastres.reference import cifar, layers, notebook, preact
from fastres.reference.resnet import BasicBlock as EagerBasicBlock
from fastres.reference.resnet import Bottleneck as EagerBottleneck
from fastres.reference.resnet import ResNet
from fastres.reference.speed import SpeedResNet, Widen, WidenAndHalve


def residual_block(block: Any) -> Block:
    """Of blocks with ``conv1``, ``bn1``, ..., ``relu``, ``downsample`` and perhaps ``residual``, as torchvision's are."""
    residual = getattr(block, "residual", True)
    return Block(numbered_layers(block), [block.relu], block.downsample, residual)


def preactivation_block(block: Any) -> Block:
    """Of the same with BatchNorm and ReLU in front of each convolution."""
    return residual_block(block)._replace(preactivation=True)


def conv_bn_relu(module: layers.ConvBNReLU) -> Block:
    """Of a block of one convolution without a shortcut."""
    return Block([(module.conv, module.bn)], residual=False, relu=module.relu)


def flatten(x: Tensor) -> Tensor:
    """[N, C, 1, 1] to [N, C]."""
    return torch.flatten(x, 1)


def stem_steps(network: Any) -> list[Step]:
    """First layers of a network."""
    return [network.conv1, network.bn1, network.relu, getattr(network, "maxpool", None)]


def reference_steps(network: Any) -> list[Step]:
    """Of the residual networks of `fastres.reference`, whose forward calls blocks, not stages."""
    steps = [*stem_steps(network), _stages(network), network.avgpool, flatten, network.fc]
    return [*steps, F.relu] if getattr(network, "relu_logits", False) else steps


def preactivation_steps(network: preact.PreActResNet) -> list[Step]:
    """Of pre-activation networks."""
    head: list[Step] = [network.bn, network.relu, network.avgpool, flatten, network.fc]
    return [network.conv1, _stages(network), *head]


def speed_steps(network: SpeedResNet) -> list[Step]:
    """Of the speed network."""
    stages = Stages(network.blocks(), network.checkpoint_every)
    return [network.conv1, network.relu, stages, network.avgpool, flatten, network.fc]


def torchvision_steps(network: torchvision_resnet.ResNet) -> list[Step]:
    """Of torchvision's ResNets."""
    stages: list[Step] = [network.layer1, network.layer2, network.layer3, network.layer4]
    return [*stem_steps(network), *stages, network.avgpool, flatten, network.fc]


def getter_steps(getter: IntermediateLayerGetter) -> list[Step]:
    """Of torchvision's backbones of segmentation networks and detectors, which return what some of their modules give."""
    return keeping_steps(getter, getter.return_layers, lambda x: x, lambda kept: kept)


def sequential_steps(modules: nn.Sequential) -> list[Step]:
    """Of modules in a row, such as a slice of a network."""
    return list(modules._modules.values())


def _stages(network: Any) -> Stages:
    """The blocks of ``layer1``, ``layer2``, ... in order."""
    stages = [getattr(network, f"layer{i}") for i in range(1, 5) if hasattr(network, f"layer{i}")]
    return Stages([block for stage in stages for block in stage], network.checkpoint_every)


for _cls in (
    EagerBasicBlock,
    EagerBottleneck,
    notebook.NotebookBlock,
    Widen,
    torchvision_resnet.BasicBlock,
    torchvision_resnet.Bottleneck,
):
    register_block(_cls, residual_block)
register_block(preact.PreActBottleneck, preactivation_block)
register_block(layers.ConvBNReLU, conv_bn_relu)
for _cls in (ResNet, cifar.CifarResNet, notebook.NotebookResNet):
    register_network(_cls, reference_steps)
register_network(preact.PreActResNet, preactivation_steps)
register_network(SpeedResNet, speed_steps)
register_network(torchvision_resnet.ResNet, torchvision_steps)
for _cls in (WidenAndHalve, layers.Stem):
    register_network(_cls, stem_steps)
register_network(IntermediateLayerGetter, getter_steps)
register_network(nn.Sequential, sequential_steps)

BasicBlock: Any = fused_class(EagerBasicBlock)
Bottleneck: Any = fused_class(EagerBottleneck)
PreActBottleneck: Any = fused_class(preact.PreActBottleneck)
ConvBNReLU: Any = fused_class(layers.ConvBNReLU)
Stem: Any = fused_class(layers.Stem)
