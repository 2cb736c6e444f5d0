"""What `fastres.reference.layers` and ``nn.Sequential`` are made of."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastres.nn.adapters.common import stem_steps
from fastres.nn.classes import fused_class
from fastres.nn.structure import Block, Step, register_block, register_network
from fastres.reference import layers


def conv_bn_relu(module: layers.ConvBNReLU) -> Block:
    """Of a block of one convolution without a shortcut."""
    return Block([(module.conv, module.bn)], residual=False, relu=module.relu)


def sequential_steps(modules: nn.Sequential) -> list[Step]:
    """Of modules in a row, such as a slice of a network."""
    return list(modules._modules.values())


register_block(layers.ConvBNReLU, conv_bn_relu)
register_network(layers.Stem, stem_steps)
register_network(nn.Sequential, sequential_steps)

ConvBNReLU: Any = fused_class(layers.ConvBNReLU)
Stem: Any = fused_class(layers.Stem)
