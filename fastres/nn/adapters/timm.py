"""What timm's residual networks are made of; timm itself is not imported.

Blocks with attention (SE and the like), anti-aliasing, or a dropping of paths or pixels that is active run eagerly.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.nn.adapters.common import keeping_steps, numbered_layers
from fastres.nn.bypass import DROPOUTS, eager_class, has_hooks
from fastres.nn.structure import Block, Step, register_named_block, register_named_network

RESNET = "timm.models.resnet"
FEATURES = "timm.models._features"


def residual_block(block: Any) -> Block:
    """Of ``BasicBlock`` and ``Bottleneck``."""
    activations = [getattr(block, f"act{i}") for i in (1, 2, 3) if hasattr(block, f"act{i}")]
    for module in (block.drop_block, block.drop_path):
        _know(module)
    absent = [block.aa, block.se, block.drop_block, block.drop_path]
    return Block(numbered_layers(block), activations, block.downsample, absent=absent)


def resnet_steps(network: Any) -> list[Step]:
    """Of ``ResNet``, whatever its stem, pool and head."""
    stages: list[Step] = [network.layer1, network.layer2, network.layer3, network.layer4]
    if network.grad_checkpointing:
        stages = [partial(_checkpointed, network)]
    steps: list[Step] = [network.conv1, network.bn1, network.act1, network.maxpool, *stages]
    steps += _pool_steps(network.global_pool)
    if network.drop_rate:
        steps.append(_dropout(network))
    return [*steps, network.fc]


def feature_steps(network: Any, result: Callable[[OrderedDict], Any] = lambda kept: kept) -> list[Step]:
    """Of ``FeatureDictNet`` and ``FeatureListNet``, the networks of ``features_only=True``."""
    if network.grad_checkpointing:  # of each module by itself
        return [partial(eager_class(type(network)).forward, network)]

    def value(x: Any) -> Any:
        if not isinstance(x, (tuple, list)):
            return x
        return torch.cat(x, 1) if network.concat else x[0]

    return keeping_steps(network, network.return_layers, value, result)


def feature_list_steps(network: Any) -> list[Step]:
    """Of ``FeatureListNet``."""
    return feature_steps(network, lambda kept: list(kept.values()))


def _know(module: nn.Module | None) -> None:
    """Let those of timm's modules that drop paths or blocks count as dropouts."""
    named = type(module).__name__ in ("DropPath", "DropBlock2d") and type(module).__module__.startswith("timm.")
    if module is not None and named and DROPOUTS.of(type(module)) is None:
        DROPOUTS.add(type(module))


def _pool_steps(pool: Any) -> list[Step]:
    """Of a ``SelectAdaptivePool2d`` its own two modules, where nothing waits for its call."""
    known = type(pool).__name__ == "SelectAdaptivePool2d" and type(pool).__module__.startswith("timm.")
    if not known or has_hooks(pool) or "forward" in pool.__dict__:
        return [pool]
    return [pool.pool, pool.flatten]


def _dropout(network: Any) -> Callable[[Tensor], Tensor]:
    def dropout(x: Tensor) -> Tensor:
        return F.dropout(x, p=float(network.drop_rate), training=network.training)

    return dropout


def _checkpointed(network: Any, x: Tensor) -> Tensor:
    """The stages as timm runs them with ``set_grad_checkpointing``."""
    checkpoint_seq = sys.modules[RESNET].checkpoint_seq
    return checkpoint_seq([network.layer1, network.layer2, network.layer3, network.layer4], x, flatten=True)


for _name in ("BasicBlock", "Bottleneck"):
    register_named_block(RESNET, _name, residual_block)
register_named_network(RESNET, "ResNet", resnet_steps)
register_named_network(FEATURES, "FeatureDictNet", feature_steps)
register_named_network(FEATURES, "FeatureListNet", feature_list_steps)
