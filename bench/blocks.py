"""The parts that networks are made of, each with the input it meets, to be measured one by one."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastres.models import create_model
from fastres.nn import fuse, networks
from fastres.nn.blocks import in_chains
from fastres.nn.structure import Stages, is_block, structure_of, tell


@dataclass(frozen=True)
class Part:
    """Blocks of a network that follow one another, or its stem."""

    name: str  # of the first block
    modules: nn.Sequential  # eager, channels-last
    shape: tuple[int, int, int]  # C, H, W of its input
    stem: bool = False  # the first layers, whose input, the images, needs no gradient

    def images(self, batch: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised channels-last input that needs a gradient where the part's input does."""
        x = torch.empty(batch, *self.shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
        return x.requires_grad_(not self.stem)

    def first(self, count: int = 1) -> Part:
        """Its first block alone, or its first blocks; of a stem all."""
        return self if self.stem else Part(self.name, self.modules[:count], self.shape)

    @property
    def blocks(self) -> int:
        """Residual blocks, or other members of a stage; a stem counts as one."""
        return 1 if self.stem else len(self.modules)


class FusedStem(nn.Module):
    """First layers as a fused network applies them."""

    def __init__(self, layers: nn.Sequential):
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, C', H', W']."""
        return networks.run_parts(networks.parts_of(list(self.layers)), x)


class FusedChain(nn.Module):
    """Fused blocks as their network applies them: several at once, or each handing its statistics to the next."""

    def __init__(self, blocks: Any):
        super().__init__()
        self.blocks: Any = blocks  # an nn.Sequential
        structure = structure_of(blocks[0])[0] if is_block(type(blocks[0])) else None  # else first layers with a pool
        self.preact = False
        if structure is not None and structure.preactivation:
            self.preact = True
            self.register_buffer("coef", torch.empty(5, structure.layers[0][1].num_features))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, C', H', W']."""
        if not self.preact:
            return in_chains(self.blocks, x)
        return in_chains(self.blocks, (x, self.coef))[0]


def fused(part: Part, recompute: bool = False) -> nn.Module:
    """The part's fused form, see `fastres.nn.fuse`; the eager one stays as it is."""
    modules = copy.deepcopy(part.modules)
    return FusedStem(modules) if part.stem else FusedChain(fuse(modules, recompute))


def parts_of(network: str, size: int, **options: Any) -> list[Part]:
    """Stem and stages of a network for images of ``size`` x ``size`` pixels, as its adapter tells them.

    A stage is the blocks that one module of the network holds, as ``layer1`` does.

    Raises:
        ValueError: for a network that does not fuse.
    """
    model = create_model(network, **options).to(memory_format=torch.channels_last)
    steps, reason = tell(model)
    if reason is not None:
        raise ValueError(f"{network} does not fuse: {reason}")
    place = next(place for place, step in enumerate(steps) if isinstance(step, Stages))
    names = {id(module): name for name, module in model.named_modules()}
    stages: dict[str, list[nn.Module]] = {}
    for block in steps[place].blocks:
        stages.setdefault(names[id(block)].rpartition(".")[0], []).append(block)
    stem = [step for step in steps[:place] if step is not None]
    held = [("stem", stem), *((f"{name}.0", blocks) for name, blocks in stages.items())]
    x, found = torch.empty(1, 3, size, size, device="meta"), []
    for name, layers in held:
        modules = nn.Sequential(*layers)
        found.append(Part(name, modules, (x.shape[1], x.shape[2], x.shape[3]), name == "stem"))
        with torch.no_grad():
            x = copy.deepcopy(modules).to("meta").eval()(x)  # in training a BatchNorm refuses a single pixel
    return found


def train(module: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    """Forward and backward under autocast, the gradient of the result uninitialised."""
    module.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        out = module(x)
    out.backward(torch.empty_like(out))
