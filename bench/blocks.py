"""The parts that networks are made of, each with the input it meets, to be measured one by one."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.models import create_model
from fastres.nn import fuse
from fastres.nn.blocks import in_chains
from fastres.nn.stem import fused_stem
from fastres.reference.preact import PreActBottleneck


@dataclass(frozen=True)
class Part:
    """Blocks of a network that follow one another, or its stem."""

    name: str  # of the first block
    modules: nn.Sequential  # eager, channels-last
    shape: tuple[int, int, int]  # C, H, W of its input

    def images(self, batch: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised channels-last input that needs a gradient where the part's input does."""
        x = torch.empty(batch, *self.shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
        return x.requires_grad_(not isinstance(self.modules[0], EagerStem))

    def first(self, count: int = 1) -> Part:
        """Its first block alone, or its first blocks."""
        return Part(self.name, self.modules[:count], self.shape)


class EagerStem(nn.Module):
    """The first layers of a network: convolution, BatchNorm, ReLU, perhaps a pool; or only the convolution."""

    conv1: nn.Module
    bn1: nn.Module | None
    maxpool: nn.Module | None

    def __init__(self, network: Any):
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


class FusedChain(nn.Module):
    """Fused blocks as their network applies them: several at once, or each handing its statistics to the next."""

    def __init__(self, blocks: Any):
        super().__init__()
        self.blocks: Any = blocks  # an nn.Sequential
        self.preact = isinstance(blocks[0], PreActBottleneck)
        if self.preact:
            self.register_buffer("coef", torch.empty(5, blocks[0].bn1.num_features))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, C', H', W']."""
        if not self.preact:
            return in_chains(self.blocks, x)
        return in_chains(self.blocks, (x, self.coef))[0]


def fused(part: Part, recompute: bool = False) -> nn.Module:
    """The part's fused form, see `fastres.nn.fuse`; the eager one stays as it is."""
    modules = copy.deepcopy(part.modules)
    if isinstance(modules[0], EagerStem):
        modules[0].__class__ = FusedStem
        return modules
    return FusedChain(fuse(modules, recompute))


def parts_of(network: str, size: int, **options: Any) -> list[Part]:
    """Stem and stages of a network for images of ``size`` x ``size`` pixels."""
    model = create_model(network, **options).to(memory_format=torch.channels_last)
    stages = [name for name in ("layer1", "layer2", "layer3", "layer4") if hasattr(model, name)]
    parts = [("stem", nn.Sequential(EagerStem(model)))] + [(f"{name}.0", getattr(model, name)) for name in stages]
    x, found = torch.empty(1, 3, size, size, device="meta"), []
    for name, modules in parts:
        found.append(Part(name, modules, (x.shape[1], x.shape[2], x.shape[3])))
        with torch.no_grad():
            x = copy.deepcopy(modules).to("meta")(x)
    return found


def train(module: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    """Forward and backward under autocast, the gradient of the result uninitialised."""
    module.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        out = module(x)
    out.backward(torch.empty_like(out))
