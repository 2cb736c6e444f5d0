"""The blocks that networks are made of, each with the input it meets, to be measured one by one."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.models import create_model
from fastres.nn import fuse
from fastres.nn.blocks import PreActBottleneck
from fastres.nn.networks import blocks_of as residual_blocks
from fastres.nn.stem import fused_stem


class Block(NamedTuple):
    """A part of a network."""

    name: str  # of the first such part in the network
    count: int  # parts with the same layers and input
    module: nn.Module  # eager, channels-last
    shape: tuple[int, int, int]  # C, H, W of its input

    def images(self, batch: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised channels-last input that needs a gradient where the part's input does."""
        x = torch.empty(batch, *self.shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
        return x.requires_grad_(not isinstance(self.module, EagerStem))


class EagerStem(nn.Module):
    """The first layers of a network: convolution, BatchNorm, ReLU, perhaps a pool; or only the convolution."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.conv1, self.bn1 = network.conv1, getattr(network, "bn1", None)
        self.maxpool = getattr(network, "maxpool", None)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, C', H', W']."""
        x = self.conv1(x)
        if self.bn1 is not None:
            x = F.relu(self.bn1(x), inplace=True)
        return x if self.maxpool is None else self.maxpool(x)


class FusedStem(EagerStem):
    """`EagerStem`, fused."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, C', H', W']."""
        return self.conv1(x) if self.bn1 is None else fused_stem(x, self.conv1, self.bn1, self.maxpool)


class _Chained(nn.Module):
    """A fused pre-activation block inside its network: it is handed the statistics of its input, and hands on."""

    def __init__(self, block: PreActBottleneck):
        super().__init__()
        self.block = block
        self.register_buffer("coef", torch.empty(5, block.bn1.num_features))

    def forward(self, x: Tensor) -> Tensor:
        return self.block((x, self.coef))[0]


def fused(block: Block, keep: str = "all") -> nn.Module:
    """The block's fused form, see `fastres.nn.fuse`; the eager one stays as it is."""
    module = copy.deepcopy(block.module)
    if isinstance(module, EagerStem):
        module.__class__ = FusedStem
        return module
    module = fuse(module, keep)
    return _Chained(module) if isinstance(module, PreActBottleneck) else module


def blocks_of(network: str, size: int, **options: object) -> list[Block]:
    """Stem and blocks of a network for images of ``size`` x ``size`` pixels, equal ones counted together."""
    model = create_model(network, **options)
    found: dict[tuple, Block] = {}
    shape = torch.empty(1, 3, size, size, device="meta")
    parts = [("stem", EagerStem(model))]
    names = {module: name for name, module in model.named_modules()}
    parts += [(names[block], block) for block in residual_blocks(model)]
    for name, module in parts:
        key = (str(module), tuple(shape.shape))
        if key in found:
            found[key] = found[key]._replace(count=found[key].count + 1)
        else:
            whole = copy.deepcopy(module).to(memory_format=torch.channels_last)
            found[key] = Block(name, 1, whole, tuple(shape.shape[1:]))
        with torch.no_grad():
            shape = copy.deepcopy(module).to("meta")(shape)
    return list(found.values())


def train(module: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    """Forward and backward of a block under autocast, the gradient of its result uninitialised."""
    module.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        out = module(x)
    out.backward(torch.empty_like(out))
