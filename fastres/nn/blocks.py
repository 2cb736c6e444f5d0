"""The fused forward of residual blocks, one by one and several at once.

Where a block's convolutions, BatchNorms and activations may be bypassed (see `fastres.nn.bypass`) they hold the
parameters and the modes, and are not called; where not, that block runs its eager forward.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastres.nn.bypass import first_reason, say_once, watched
from fastres.nn.classes import Fused, form
from fastres.nn.norm import Tracking, conv_of, group_of, layer_of, to_nchw, to_nhwc, track
from fastres.nn.roles import has_hooks, identity_of
from fastres.nn.structure import (
    Block,
    is_block,
    layers_reason,
    projection_behind,
    projection_of,
    structure_of,
)
from fastres.nn.unchanged import while_unchanged
from fastres.ops import Conv, Identity, Layer, residual_chain
from fastres.ops.fused import Planned
from fastres.ops.layers import output_hw
from fastres.ops.operation import has_autocast
from fastres.ops.plain import activated
from fastres.ops.preact import planned_preact
from fastres.ops.residual import planned_chain

LONGEST = 8  # blocks in a chain
BOTTLENECK = 3  # convolutions of a block
LEAST_BEFORE = 3  # blocks in front of a projection that joins
MOST_SHAPES = 8  # of inputs by which a chain is kept ready

Pairs = Sequence[tuple[Any, Any]]


def fused_residual(
    x: Tensor,
    blocks: Sequence[Pairs],
    shortcut: Any = None,
    residual: bool = True,
    relu: bool = True,
    recompute: bool = False,
    act: str = "relu",
) -> Tensor:
    """``relu(bn_n(conv_n(... relu(bn_1(conv_1(x))))) + shortcut(x))`` and the update of the running statistics.

    Where the convolutions and BatchNorms may not be bypassed they are called one by one.

    Args:
        x: [N, C, H, W], channels-last unless a copy is wanted.
        blocks: convolutions with their BatchNorms, in order, of one block and of others behind it, whose shortcuts are
            their inputs.
        shortcut: of the first block, None: x itself. A convolution and a BatchNorm in an ``nn.Sequential`` join the
            operation, and so does what `identity_of` knows. With other modules in front of them there they are an
            operation of their own. Any other module is called.
        residual: whether the first block has a shortcut at all.
        relu, recompute: see `residual_chain`.
        act: the activation of all blocks, of `fastres.kernels.types.ACTIVATIONS`.
    """
    reason = first_reason(
        layers_reason(pairs, not residual and (relu or index < len(blocks) - 1), act)
        for index, pairs in enumerate(blocks)
    )
    if reason is not None:
        say_once(blocks[0][0][0], reason, "the eager forward of a block")
    if reason is not None or watched(x):
        return _eager_residual(x, blocks, shortcut, residual, relu, act)
    return _fused_residual(x, blocks, shortcut, residual, relu, recompute, act=act)


def _eager_residual(
    x: Tensor,
    blocks: Sequence[Pairs],
    shortcut: Any,
    residual: bool,
    relu: bool,
    act: str,
) -> Tensor:
    for index, pairs in enumerate(blocks):
        y = x
        for number, (conv, bn) in enumerate(pairs):
            y = bn(conv(activated(y, act) if number else y))
        if residual or index > 0:
            y = y + (x if index > 0 or shortcut is None else shortcut(x))
        x = activated(y, act) if relu or index < len(blocks) - 1 else y
    return x


def _fused_residual(
    x: Tensor,
    blocks: Sequence[Pairs],
    shortcut: Any,
    residual: bool,
    relu: bool,
    recompute: bool = False,
    others: Sequence[Any] | None = None,
    act: str = "relu",
    kept: list[_Ready] | None = None,
) -> Tensor:
    """`fused_residual` of what may be bypassed; where it is one operation of x alone, that is appended to ``kept``.

    Args:
        others: the shortcuts of the blocks from the second on, as ``shortcut``, none of which is called; None: each
            one's input itself.
    """
    apart = act != "relu" and residual and not _is_kept(shortcut)  # the gradient of GELU is of the sum
    if apart and len(blocks) > 1:
        x = _fused_residual(x, blocks[:1], shortcut, residual, True, recompute, None, act)
        second, *others = others or [None] * (len(blocks) - 1)
        return _fused_residual(x, blocks[1:], second, True, relu, recompute, others, act)
    nhwc = to_nhwc(x)
    chain, norms, hw = [], [], tuple(nhwc.shape[1:3])
    opened: list[Any] = []
    for index, pairs in enumerate(blocks):
        module = shortcut if index == 0 else None if others is None else others[index - 1]
        identity, projection = identity_of(module), projection_of(module)
        if index == 0 and not residual:
            opened.append(None)
        elif identity is not None:
            opened.append(identity)
        elif projection is not None:
            opened.append(layer_of(*projection, hw))
            norms.append(projection[1])
        else:
            opened.append(_called(x, module, recompute))
        norms += [bn for _, bn in pairs]
        layers, hw = _layers(pairs, hw, act)
        chain.append(layers)
    added, *further = opened
    ready = _Ready.of(planned_chain(nhwc, chain, added, relu and not apart, recompute, further), norms)
    given = added if isinstance(added, Tensor) else None
    if kept is not None and given is None and not apart:
        kept.append(ready)
    out, _ = ready.run(x, given, None)
    return activated(out, act) if apart and relu else out


def _layers(pairs: Pairs, hw: tuple[int, ...], act: str) -> tuple[list[Layer], tuple[int, ...]]:
    """A block's layers as they meet an input of height and width ``hw``, and those of its result."""
    layers = []
    for conv, bn in pairs:
        layer = layer_of(conv, bn, hw, act)
        hw = output_hw(hw, conv.kernel_size, layer.stride, layer.pad, layer.dilation)
        layers.append(layer)
    return layers, hw


def _called(x: Tensor, shortcut: Any, recompute: bool) -> Tensor:
    """[N, H, W, C] of a shortcut that is called, its convolution and BatchNorm at its end an operation of their own."""
    found = projection_behind(shortcut)
    if found is None:
        return to_nhwc(shortcut(x))
    called, (conv, bn) = found
    for module in called:
        x = module(x)
    y = to_nhwc(x)
    layers = [layer_of(conv, bn, tuple(y.shape[1:3]))]
    added, statistics = residual_chain(y, [layers], None, relu=False, recompute=recompute)
    track([bn], statistics)
    return added


class _Ready(NamedTuple):
    """An operation with its parameters, and what moves the running statistics of its BatchNorms."""

    planned: Planned
    tracking: Tracking

    @classmethod
    def of(cls, planned: Planned, norms: Sequence[Any]) -> _Ready:
        """With its BatchNorms as they run."""
        return cls(planned, Tracking(norms, planned.counts))

    def run(self, x: Tensor, added: Tensor | None, known: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The result of x, both [N, C, H, W], and if it is described its coefficients.

        Args:
            added, known: see `fused`.
        """
        out, coefs = self.planned.run(to_nhwc(x), added, known)
        self.tracking.move(coefs)
        return to_nchw(out), coefs[-1] if len(coefs) > len(self.planned.counts) else None


def _is_kept(shortcut: Any) -> bool:
    """Whether backward has what a shortcut adds: the block's input as it is, or a projection of it."""
    return identity_of(shortcut) == Identity() or projection_of(shortcut) is not None


@dataclass
class Link:
    """Blocks that run as one operation, with the structure of each; without structures: a module that is called.

    Attributes:
        begin: the place of the first.
        recompute: see `FusedBlock`.
        ready: the operation by what it depends on beside the blocks.
    """

    begin: int
    structures: list[Block]
    recompute: bool = False
    ready: dict[Hashable, _Ready] = field(default_factory=dict)

    def run(self, x: Tensor, coef: Tensor | None, next_coef: bool, held: frozenset[int]) -> tuple[Tensor, Any]:
        """The result, and for pre-activation blocks what the next BatchNorm needs to know of it.

        Args:
            x: [N, C, H, W]. coef, next_coef: see `preact_chain`.
            held: the identities of parameters and buffers that are the same the next time.
        """
        key = x.shape, x.dtype, x.device, has_autocast(x.device.type), None if coef is None else coef.shape, next_coef
        ready = self.ready.get(key) if held else None
        if ready is not None:
            return ready.run(x, None, coef)
        kept: list[_Ready] = []
        if self.structures[0].preactivation:
            out, coef = _preactivation(x, self.structures, coef, next_coef, kept)
        else:
            out, coef = _chain(x, self.structures, self.recompute, kept), None
        if held and kept and all(t is None or id(t) in held for t in kept[0].planned.parameters):
            if len(self.ready) >= MOST_SHAPES:
                self.ready.clear()
            self.ready[key] = kept[0]
        return out, coef


def chains(blocks: Sequence[nn.Module], running: bool = False) -> list[Link]:
    """The blocks in order, grouped into what runs at once.

    A block joins the one before if its shortcut is an `Identity`, or a projection around a bottleneck behind
    `LEAST_BEFORE` others, or both are pre-activation blocks; if both keep the same for backward, take statistics over
    the same ranks and nothing waits for the call of either. Chains are at most `LONGEST` blocks, so that gradients come
    early enough to be exchanged meanwhile.

    What a chain keeps is there until its backward ends, also while backward of a network's first stage needs the most
    memory beside it. So ResNet-50 takes 4% more memory at once than with a chain for each stage (on a CPU, fp32). A
    network of basic blocks would take a quarter more, for 1.6% of a step's time by the model (`bench.machine`): its
    stages are chains apart, as those of few bottlenecks, and of blocks that compute outputs again to save memory.

    Args:
        running: whether this is asked in a block's own forward, see `Known.changed`.
    """
    links: list[Link] = []
    for place, block in enumerate(blocks):
        structure = None if not running and must_be_called(block) else _structure(block, running)
        if structure is None:
            links.append(Link(place, []))
            continue
        last = links[-1] if links and links[-1].structures else None
        recompute: Any = block.recompute
        if last and len(last.structures) < LONGEST and last.recompute == recompute and _joins(last, structure):
            last.structures.append(structure)
        else:
            links.append(Link(place, [structure], recompute))
    return links


def _in_own_forward(blocks: Sequence[nn.Module]) -> list[Link]:
    return chains(blocks, running=True)


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
    links, held = while_unchanged(blocks, "chains", chains) if blocks else ([], frozenset())
    for index, link in enumerate(links):
        if link.structures:
            x, coef = link.run(x, coef, paired or index < len(links) - 1, held)
        else:
            x, coef = blocks[link.begin](x), None
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


def _joins_projected(link: Link, structure: Block) -> bool:
    """Whether a block with a projection joins, see `chains`."""
    bottlenecks = all(len(one.layers) >= BOTTLENECK for one in (*link.structures, structure))
    fits = bottlenecks and len(link.structures) >= LEAST_BEFORE and not link.recompute
    return fits and projection_of(structure.shortcut) is not None


def _joins(link: Link, structure: Block) -> bool:
    before = link.structures[-1]
    if before.preactivation:
        suits = structure.preactivation
    else:
        identity = identity_of(structure.shortcut)
        joins = identity is not None and (structure.act == "relu" or identity == Identity())
        suits = (
            not structure.preactivation
            and before.relu
            and structure.residual
            and (joins or _joins_projected(link, structure))
        )
    return suits and before.act == structure.act and group_of(before.layers[0][1]) == group_of(structure.layers[0][1])


def _chain(x: Tensor, structures: Sequence[Block], recompute: bool, kept: list[_Ready]) -> Tensor:
    first, *others = structures
    pairs, relu, shortcuts = [one.layers for one in structures], structures[-1].relu, [one.shortcut for one in others]
    return _fused_residual(x, pairs, first.shortcut, first.residual, relu, recompute, shortcuts, first.act, kept)


def _preactivation(
    x: Tensor, blocks: Sequence[Block], coef: Tensor | None, next_coef: bool, kept: list[_Ready]
) -> tuple[Tensor, Tensor | None]:
    """Pre-activation blocks of [N, C, H, W], and with ``next_coef`` what the next BatchNorm needs to know of the
    result; ``kept`` as `_fused_residual` has it.
    """
    nhwc = to_nhwc(x)
    chain, hw = [], tuple(nhwc.shape[1:3])
    shortcuts: list[Identity | Conv | None] = []
    for block in blocks:
        identity = Identity() if block.shortcut is None else conv_of(block.shortcut, hw)
        shortcuts.append(identity if block.residual else None)
        layers, hw = _layers(block.layers, hw, block.act)
        chain.append(layers)
    by_batch = chain[-1][0].norm.running_mean is None
    planned = planned_preact(nhwc, chain, shortcuts, coef, next_coef and by_batch)
    kept.append(_Ready.of(planned, [bn for block in blocks for _, bn in block.layers]))
    return kept[0].run(x, None, coef)


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
        if watched(x):
            return super().forward(x)
        links, held = while_unchanged([self], "block", _in_own_forward)
        return links[0].run(x, None, False, held)[0] if links[0].structures else super().forward(x)
