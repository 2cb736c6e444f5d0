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
from torch import Tensor

from fastres.nn.adapters.common import keeping_steps, numbered_layers
from fastres.nn.bypass import absent_reason, unsupported
from fastres.nn.roles import CONTAINERS, DROPOUTS, GELUS, HOLDERS, RECTIFYING, eager_class
from fastres.nn.structure import Block, Step, register_named_block, register_named_network

RESNET = "timm.models.resnet"
RESNETV2 = "timm.models.resnetv2"
FEATURES = "timm.models._features"

DROPOUTS.add_named("timm.layers.drop", "DropPath", "DropBlock2d")
GELUS.add_named("timm.layers.activations", "GELU")
RECTIFYING.add_named("timm.layers.norm_act", "BatchNormAct2d", "SyncBatchNormAct")
HOLDERS.add_named("timm.layers.adaptive_avgmax_pool", "SelectAdaptivePool2d")
HOLDERS.add_named("timm.layers.classifier", "ClassifierHead")
HOLDERS.add_named(RESNETV2, "DownsampleConv", "DownsampleAvg", "ResNetStage")


def residual_block(block: Any) -> Block:
    """Of ``BasicBlock`` and ``Bottleneck``."""
    activations = [getattr(block, f"act{i}") for i in (1, 2, 3) if hasattr(block, f"act{i}")]
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


def preactivation_block(block: Any) -> Block:
    """Of resnetv2's ``PreActBasic`` and ``PreActBottleneck`` with ``BatchNormAct2d``."""
    layers = numbered_layers(block, "norm")
    activations: list[Any] = [norm.act for _, norm in layers]
    shortcut, absent, opened = block.downsample, [block.drop_path], []
    if shortcut is not None:
        opened, absent = [shortcut], [*absent, getattr(shortcut, "pool", None), getattr(shortcut, "norm", None)]
        shortcut = getattr(shortcut, "conv", shortcut)
    return Block(layers, activations, shortcut, preactivation=True, absent=absent, opened=opened)


def postactivation_block(block: Any) -> Block:
    """Of resnetv2's ``Bottleneck``, of networks with ``preact=False``."""
    layers, shortcut = numbered_layers(block, "norm"), block.downsample
    activations: list[Any] = [*(norm.act for _, norm in layers[:-1]), block.act3]
    opened: list[Any] = []
    if shortcut is not None and HOLDERS.reason(shortcut) is None:
        pair, pool = (shortcut.conv, shortcut.norm), getattr(shortcut, "pool", None)
        if unsupported(*pair) is None and absent_reason(pool) is None:
            shortcut, opened = pair, [shortcut]
    return Block(layers, activations, shortcut, absent=[block.drop_path], opened=opened)


def stage_steps(stage: Any) -> list[Step]:
    """Of resnetv2's ``ResNetStage``: its blocks."""
    if stage.grad_checkpointing:
        return [partial(eager_class(type(stage)).forward, stage)]
    return [stage.blocks]


def resnetv2_steps(network: Any) -> list[Step]:
    """Of ``ResNetV2``."""
    steps: list[Step] = [network.stem]
    if CONTAINERS.reason(network.stages) is None:
        for stage in network.stages:
            held = HOLDERS.reason(stage) is not None or stage.grad_checkpointing
            steps.append(stage if held else stage.blocks)
    else:
        steps.append(network.stages)
    head = network.head
    steps.append(network.norm)
    if type(head).__name__ != "ClassifierHead" or HOLDERS.reason(head) is not None:
        return [*steps, head]
    return [*steps, *_pool_steps(head.global_pool), head.drop, head.fc, head.flatten]


def _pool_steps(pool: Any) -> list[Step]:
    """Of a ``SelectAdaptivePool2d`` its own two modules, where nothing waits for its call."""
    named = type(pool).__name__ == "SelectAdaptivePool2d"
    return [pool.pool, pool.flatten] if named and HOLDERS.reason(pool) is None else [pool]


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
for _name in ("PreActBasic", "PreActBottleneck"):
    register_named_block(RESNETV2, _name, preactivation_block)
register_named_block(RESNETV2, "Bottleneck", postactivation_block)
register_named_network(RESNETV2, "ResNetStage", stage_steps)
register_named_network(RESNETV2, "ResNetV2", resnetv2_steps)
register_named_network(FEATURES, "FeatureDictNet", feature_steps)
register_named_network(FEATURES, "FeatureListNet", feature_list_steps)
