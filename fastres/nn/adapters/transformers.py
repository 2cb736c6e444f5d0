"""What transformers' ResNets are made of; transformers itself is not imported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastres.nn.bypass import unsupported
from fastres.nn.roles import HOLDERS
from fastres.nn.structure import Block, Step, register_named_block, register_named_network

RESNET = "transformers.models.resnet.modeling_resnet"
HOLDERS.add_named(RESNET, "ResNetConvLayer", "ResNetShortCut")


def residual_block(block: Any) -> Block:
    """Of ``ResNetBasicLayer`` and ``ResNetBottleNeckLayer``: a Sequential of ``ResNetConvLayer`` around a shortcut."""
    layers = list(block.layer._modules.values())
    activations = [*(layer.activation for layer in layers[:-1]), block.activation]
    shortcut, absent, opened = block.shortcut, [layers[-1].activation], [block.layer, *layers]
    if isinstance(shortcut, nn.Identity):
        shortcut, absent = None, [*absent, shortcut]
    elif type(shortcut).__name__ == "ResNetShortCut":
        pair = shortcut.convolution, shortcut.normalization
        if HOLDERS.reason(shortcut) is None and unsupported(*pair) is None:
            shortcut = pair
    pairs = [(layer.convolution, layer.normalization) for layer in layers]
    return Block(pairs, activations, shortcut, absent=absent, opened=opened)


def stage_steps(stage: Any) -> list[Step]:
    """Of ``ResNetStage``: its blocks."""
    return list(stage.layers._modules.values())


def embedding_steps(embeddings: Any) -> list[Step]:
    """Of ``ResNetEmbeddings``: the stem."""
    layer = embeddings.embedder
    held = HOLDERS.reason(layer) is not None
    first = [layer] if held else [layer.convolution, layer.normalization, layer.activation]
    return [_check_of(embeddings), *first, embeddings.pooler]


def _check_of(embeddings: Any) -> Callable[[Tensor], Tensor]:
    def check(x: Tensor) -> Tensor:
        if x.shape[1] != embeddings.num_channels:
            raise ValueError(
                "Make sure that the channel dimension of the pixel values match with the one set in the configuration."
            )
        return x

    return check


for _name in ("ResNetBasicLayer", "ResNetBottleNeckLayer"):
    register_named_block(RESNET, _name, residual_block)
register_named_network(RESNET, "ResNetStage", stage_steps)
register_named_network(RESNET, "ResNetEmbeddings", embedding_steps)
