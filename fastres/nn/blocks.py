"""The fused forward of residual blocks, one by one and several at once.

Where a block's convolutions, BatchNorms and activations may be bypassed (see `fastres.nn.bypass`) they hold the
parameters and the modes, and are not called; where not, that block runs its eager forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from fastres.nn.bypass import first_reason, say_once, watched
from fastres.nn.classes import Fused, form
from fastres.nn.norm import conv_of, group_of, layer_of, to_nchw, to_nhwc, track
from fastres.nn.roles import has_hooks, identity_of
from fastres.nn.structure import (
    Block,
    is_block,
    layers_reason,
    projection_behind,
    projection_of,
    structure_of,
)
from fastres.ops import Conv, Identity, Layer, Statistics, preact_chain, residual_chain
from fastres.ops.layers import output_hw
from fastres.ops.plain import activated

LONGEST = 8  # blocks in a chain

Pairs = Sequence[tuple[Any, Any]]


def fused_residual(
    x: Tensor,
    blocks: Sequence[Pairs],
    shortcut: Any = None,
    residual: bool = True,
    relu: bool = True,
    recompute: bool = False,
    identities: Sequence[Identity] | None = None,
    act: str = "relu",
) -> Tensor:
    """``relu(bn_n(conv_n(... relu(bn_1(conv_1(x))))) + shortcut(x))`` and the update of the running statistics.

    Where the convolutions and BatchNorms may not be bypassed they are called one by one.

    Args:
        x: [N, C, H, W], channels-last unless a copy is wanted.
        blocks: convolutions with their BatchNorms, in order, of one block and of others behind it.
        shortcut: of the first block, None: x itself. A convolution and a BatchNorm in an ``nn.Sequential`` join the
            operation, and so does what `identity_of` knows. With other modules in front of them there they are an
            operation of their own. Any other module is called.
        residual: whether it has a shortcut at all.
        relu, recompute, identities: see `residual_chain`.
        act: the activation of all blocks, of `fastres.kernels.types.ACTIVATIONS`.
    """
    reason = first_reason(
        layers_reason(pairs, not residual and (relu or index < len(blocks) - 1), act)
        for index, pairs in enumerate(blocks)
    )
    if reason is not None:
        say_once(blocks[0][0][0], reason, "the eager forward of a block")
    if reason is not None or watched(x):
        return _eager_residual(x, blocks, shortcut, residual, relu, identities, act)
    return _fused_residual(x, blocks, shortcut, residual, relu, recompute, identities, act)


def _eager_residual(
    x: Tensor,
    blocks: Sequence[Pairs],
    shortcut: Any,
    residual: bool,
    relu: bool,
    identities: Sequence[Identity] | None,
    act: str,
) -> Tensor:
    for index, pairs in enumerate(blocks):
        y = x
        for number, (conv, bn) in enumerate(pairs):
            y = bn(conv(activated(y, act) if number else y))
        if residual and index == 0:
            y = y + (x if shortcut is None else shortcut(x))
        elif residual:
            step, added = Identity() if identities is None else identities[index - 1]
            y = y + F.pad(x[:, :, ::step, ::step], (0, 0, 0, 0, 0, added))
        x = activated(y, act) if relu or index < len(blocks) - 1 else y
    return x


def _fused_residual(
    x: Tensor,
    blocks: Sequence[Pairs],
    shortcut: Any,
    residual: bool,
    relu: bool,
    recompute: bool = False,
    identities: Sequence[Identity] | None = None,
    act: str = "relu",
) -> Tensor:
    apart = act != "relu" and residual and not _is_kept(shortcut)  # the gradient of GELU is of the sum
    if apart and len(blocks) > 1:
        x = _fused_residual(x, blocks[:1], shortcut, residual, True, recompute, None, act)
        return _fused_residual(x, blocks[1:], None, True, relu, recompute, (identities or [])[1:], act)
    nhwc = to_nhwc(x)
    hw = tuple(nhwc.shape[1:3])
    chain: list[list[Layer]] = []
    for pairs in blocks:
        chain.append([])
        for conv, bn in pairs:
            layer = layer_of(conv, bn, hw, act)
            hw = output_hw(hw, conv.kernel_size, layer.stride, layer.pad, layer.dilation)
            chain[-1].append(layer)
    norms = [bn for pairs in blocks for _, bn in pairs]
    behind: list[Statistics] = []
    added: Tensor | Layer | Identity | None = None
    if residual:
        identity, projection = identity_of(shortcut), projection_of(shortcut)
        if identity is not None:
            added = identity
        elif projection is not None:
            added = layer_of(*projection, tuple(nhwc.shape[1:3]))
            norms.append(projection[1])
        elif (found := projection_behind(shortcut)) is not None:
            called, (conv, bn) = found
            y = x
            for module in called:
                y = module(y)
            y = to_nhwc(y)
            added, behind = residual_chain(
                y, [[layer_of(conv, bn, tuple(y.shape[1:3]))]], None, relu=False, recompute=recompute
            )
            norms.append(bn)
        else:
            added = to_nhwc(shortcut(x))
    out, statistics = residual_chain(nhwc, chain, added, relu and not apart, recompute, identities)
    track(norms, [*statistics, *behind])
    return activated(to_nchw(out), act) if apart and relu else to_nchw(out)


def _is_kept(shortcut: Any) -> bool:
    """Whether backward has what a shortcut adds: the block's input as it is, or a projection of it."""
    return identity_of(shortcut) == Identity() or projection_of(shortcut) is not None


class Link(NamedTuple):
    """Blocks that run as one operation, with the structure of each; without structures: a module that is called."""

    blocks: list[nn.Module]
    structures: list[Block]


def chains(blocks: Sequence[nn.Module]) -> list[Link]:
    """The blocks in order, grouped into what runs at once.

    A block joins the one before if its shortcut is an `Identity`, or both are pre-activation blocks; if both keep the
    same for backward, take statistics over the same ranks and nothing waits for the call of either. Chains are at most
    `LONGEST` blocks, so that gradients come early enough to be exchanged meanwhile.
    """
    links: list[Link] = []
    for block in blocks:
        structure = None if must_be_called(block) else _structure(block)
        if structure is None:
            links.append(Link([block], []))
        elif links and links[-1].structures and len(links[-1].blocks) < LONGEST and _joins(links[-1], block, structure):
            links[-1].blocks.append(block)
            links[-1].structures.append(structure)
        else:
            links.append(Link([block], [structure]))
    return links


def in_chains(blocks: Sequence[nn.Module], x: Any) -> Any:
    """Apply blocks in order, chains of them at once.

    Args:
        x: [N, C, H, W]; or a pair of it and the ``coef`` of `fastres.ops.preact_chain`, or None: then the result is
            such a pair too, for what begins with the BatchNorm of x.
    """
    paired = isinstance(x, tuple)
    x, coef = x if paired else (x, None)
    if watched(x):
        for block in blocks:
            x = block(x)
        return (x, None) if paired else x
    links = chains(blocks)
    for index, (members, structures) in enumerate(links):
        if not structures:
            x, coef = members[0](x), None
        elif structures[0].preactivation:
            x, coef = _preactivation(x, structures, coef, paired or index < len(links) - 1)
        else:
            x, coef = _chain(x, members, structures), None
    return (x, coef) if paired else x


def must_be_called(module: nn.Module) -> bool:
    """Whether a block's own call may not be left out."""
    return (
        type(module).forward is not FusedBlock.forward
        or has_hooks(module)
        or module._compiled_call_impl is not None
        or "forward" in module.__dict__
    )


def _structure(block: nn.Module, running: bool = False) -> Block | None:
    structure, reason = structure_of(block, running)
    if reason is not None:
        say_once(block, reason)
    return structure


def _joins(link: Link, block: nn.Module, structure: Block) -> bool:
    before = link.structures[-1]
    if before.preactivation:
        suits = structure.preactivation
    else:
        identity = identity_of(structure.shortcut)
        suits = (
            not structure.preactivation
            and before.relu
            and structure.residual
            and identity is not None
            and (structure.act == "relu" or identity == Identity())
        )
    return (
        suits
        and before.act == structure.act
        and link.blocks[-1].recompute == block.recompute
        and group_of(before.layers[0][1]) == group_of(structure.layers[0][1])
    )


def _chain(x: Tensor, blocks: Sequence[Any], structures: Sequence[Block]) -> Tensor:
    first, *others = structures
    identities: list[Any] = [identity_of(one.shortcut) for one in others]  # none is None, or they would not join
    pairs = [one.layers for one in structures]
    relu, recompute = structures[-1].relu, blocks[0].recompute
    return _fused_residual(x, pairs, first.shortcut, first.residual, relu, recompute, identities, first.act)


def _preactivation(
    x: Tensor, blocks: Sequence[Block], coef: Tensor | None, next_coef: bool
) -> tuple[Tensor, Tensor | None]:
    """Pre-activation blocks of [N, C, H, W], and with ``next_coef`` what the next BatchNorm needs to know of the
    result.
    """
    nhwc = to_nhwc(x)
    hw = tuple(nhwc.shape[1:3])
    chain: list[list[Layer]] = []
    shortcuts: list[Identity | Conv | None] = []
    for block in blocks:
        first = hw
        chain.append([])
        for conv, bn in block.layers:
            layer = layer_of(conv, bn, hw, block.act)
            hw = output_hw(hw, conv.kernel_size, *layer[2:])
            chain[-1].append(layer)
        identity = Identity() if block.shortcut is None else conv_of(block.shortcut, first)
        shortcuts.append(identity if block.residual else None)
    by_batch = chain[-1][0].norm.running_mean is None
    out, coef, statistics = preact_chain(nhwc, chain, shortcuts, coef, next_coef and by_batch)
    track([bn for block in blocks for _, bn in block.layers], statistics)
    return to_nchw(out), coef


@form(is_block)
class FusedBlock(Fused):
    """The fused forward of a block.

    Attributes:
        recompute: whether backward computes some outputs again, see `residual_chain`.
    """

    recompute = False

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to channels-last [N, C', H', W']."""
        if not isinstance(self, FusedBlock):  # its fused class was taken off, and somebody kept this method
            return type(self).forward(self, x)
        structure = None if watched(x) else _structure(self, running=True)
        if structure is None:
            return super().forward(x)
        if structure.preactivation:
            return _preactivation(x, [structure], None, False)[0]
        return _chain(x, [self], [structure])
