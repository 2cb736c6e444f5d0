"""What `fastres.reference.preact` is made of."""

from __future__ import annotations

from typing import Any

from fastres.nn.adapters.common import flatten, residual_block, stages_of
from fastres.nn.classes import fused_class
from fastres.nn.structure import Block, Step, register_block, register_network
from fastres.reference import preact


def preactivation_block(block: Any) -> Block:
    """Of blocks as torchvision's, with BatchNorm and ReLU in front of each convolution."""
    return residual_block(block)._replace(preactivation=True)


def preactivation_steps(network: preact.PreActResNet) -> list[Step]:
    """Of pre-activation networks."""
    head: list[Step] = [network.bn, network.relu, network.avgpool, flatten, network.fc]
    return [network.conv1, stages_of(network), *head]


register_block(preact.PreActBottleneck, preactivation_block)
register_network(preact.PreActResNet, preactivation_steps)

PreActBottleneck: Any = fused_class(preact.PreActBottleneck)
