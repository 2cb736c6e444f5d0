"""What `fastres.reference.resnet` is made of."""

from __future__ import annotations

from typing import Any

from fastres.nn.adapters.common import reference_steps, residual_block
from fastres.nn.classes import fused_class
from fastres.nn.structure import register_block, register_network
from fastres.reference import resnet

for _cls in (resnet.BasicBlock, resnet.Bottleneck):
    register_block(_cls, residual_block)
register_network(resnet.ResNet, reference_steps)

BasicBlock: Any = fused_class(resnet.BasicBlock)
Bottleneck: Any = fused_class(resnet.Bottleneck)
