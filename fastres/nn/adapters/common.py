"""What adapters share."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.nn.structure import Block, Stages, Step


def numbered_layers(block: nn.Module, norm: str = "bn") -> list[tuple[nn.Module, nn.Module]]:
    """``conv1`` with ``bn1`` (or another name), and so on, as far as the block has them."""
    return [(getattr(block, f"conv{i}"), getattr(block, f"{norm}{i}")) for i in (1, 2, 3) if hasattr(block, f"conv{i}")]


def keeping_steps(
    modules: nn.ModuleDict, names: Mapping[str, Any], value: Callable[[Any], Any], result: Callable[[OrderedDict], Any]
) -> list[Step]:
    """Of a container that calls its modules in order and returns what some of them give.

    Args:
        modules: the container.
        names: of the modules whose results are kept, in the container and in what it returns.
        value: what is kept of a result.
        result: what is returned, of all that was kept.
    """
    kept: OrderedDict[Any, Any] = OrderedDict()  # of one forward: adapters are asked anew at each

    def keep(name: Any, x: Any) -> Any:
        kept[name] = value(x)
        return x

    steps: list[Step] = []
    for name, module in modules.items():
        steps.append(module)
        if name in names:
            steps.append(partial(keep, names[name]))
    return [*steps, lambda x: result(kept)]


def residual_block(block: Any) -> Block:
    """Of blocks with ``conv1``, ``bn1``, ..., ``relu``, ``downsample`` and perhaps ``residual``, as torchvision's."""
    residual = getattr(block, "residual", True)
    return Block(numbered_layers(block), [block.relu], block.downsample, residual)


def flatten(x: Tensor) -> Tensor:
    """[N, C, 1, 1] to [N, C]."""
    return torch.flatten(x, 1)


def stem_steps(network: Any) -> list[Step]:
    """First layers of a network."""
    return [network.conv1, network.bn1, network.relu, getattr(network, "maxpool", None)]


def stages_of(network: Any) -> Stages:
    """The blocks of ``layer1``, ``layer2``, ... in order."""
    stages = [getattr(network, f"layer{i}") for i in range(1, 5) if hasattr(network, f"layer{i}")]
    return Stages([block for stage in stages for block in stage], network.checkpoint_every)


def reference_steps(network: Any) -> list[Step]:
    """Of the residual networks of `fastres.reference`, whose forward calls blocks, not stages."""
    steps = [*stem_steps(network), stages_of(network), network.avgpool, flatten, network.fc]
    return [*steps, F.relu] if getattr(network, "relu_logits", False) else steps
