"""What `fastres.reference.speed` is made of."""

from __future__ import annotations

from fastres.nn.adapters.common import flatten, numbered_layers, residual_block, stem_steps
from fastres.nn.roles import Window, declare_convolution, declare_pool, max_pool_window
from fastres.nn.structure import Block, Stages, Step, register_block, register_network
from fastres.reference.speed import (
    HalvingPool,
    ResidualConv,
    SmoothBlock,
    SmoothWiden,
    SpeedResNet,
    WhiteningConv,
    Widen,
    WidenAndHalve,
)


def speed_steps(network: SpeedResNet) -> list[Step]:
    """Of the whole network."""
    stages = Stages(network.blocks(), network.checkpoint_every)
    return [network.conv1, network.act, stages, network.avgpool, flatten, network.fc]


def halving_window(pool: HalvingPool, hw: tuple[int, int]) -> Window | None:
    """An image one pixel high or wide is not halved."""
    return None if min(hw) == 1 else max_pool_window(pool, hw)


def smooth_widen_steps(network: SmoothWiden) -> list[Step]:
    """Of the whole network."""
    return [network.conv1, network.bn1, network.maxpool, network.gelu]


def smooth_block(block: SmoothBlock) -> Block:
    """Of the whole block."""
    return Block(numbered_layers(block), [block.gelu])


declare_convolution(WhiteningConv, bias=True)
declare_pool(HalvingPool, halving_window)
register_block(Widen, residual_block)
register_block(ResidualConv, residual_block)
register_network(WidenAndHalve, stem_steps)
register_block(SmoothBlock, smooth_block)
register_network(SmoothWiden, smooth_widen_steps)
register_network(SpeedResNet, speed_steps)
