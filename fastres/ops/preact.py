"""Pre-activation residual blocks (He et al. 2016) as one operation.

``shortcut + conv_n(relu(bn_n(... conv_1(relu(bn_1(x))))))``: BatchNorm and ReLU stand before each convolution, so all
of them are prologues, and the shortcut is added in the last convolution's epilogue, which also reduces the statistics
that the next block's first BatchNorm needs. Kept for backward: x and y1 ... y(n-1) of each block. Blocks that follow
one another may be one operation too, which moves the same bytes in fewer calls.
"""

from collections.abc import Sequence

from torch import Tensor

from fastres.ops.fused import Planned
from fastres.ops.layers import (
    Conv,
    Identity,
    Layer,
    Statistics,
    check_coef,
    check_input,
    check_norm,
    check_shortcut_shape,
    conv_shape,
    group_of,
    norm_vectors,
    pixels,
)
from fastres.ops.nodes import Conv as ConvNode
from fastres.ops.nodes import Describe, Node, Norm, Open
from fastres.ops.plan import Plan


def preact_block(
    x: Tensor,
    layers: Sequence[Layer],
    shortcut: Tensor | Conv | None = None,
    coef: Tensor | None = None,
    next_coef: bool = False,
) -> tuple[Tensor, Tensor | None, list[Statistics]]:
    """Pre-activation block, differentiable: a `preact_chain` of one.

    Args:
        x: [N, H, W, C].
        layers: each a BatchNorm and the convolution of its rectified result, in order.
        shortcut: None, x itself for the identity, or a `Conv` of ``relu(bn_1(x))``.
        coef: [5, C] that begins with x's mean and biased variance, this rank's own, as the block before returned it;
            None: they are reduced from x where the first BatchNorm needs them.
        next_coef: whether to return the like of the result.

    Returns:
        The result [N, H', W', C'], its mean and biased variance in a [5, C'] or None, and each layer's `Statistics`.

    Raises:
        RuntimeError, ValueError: as `torch.nn.functional.conv2d` and `batch_norm` raise them; ValueError for no layer
            and for a shortcut that is another tensor than x.
    """
    if not (shortcut is None or shortcut is x or isinstance(shortcut, Conv)):
        raise ValueError("the shortcut of a pre-activation block is x itself, a Conv or None")
    opened = Identity() if isinstance(shortcut, Tensor) else shortcut
    return preact_chain(x, [layers], [opened], coef, next_coef)


def preact_chain(
    x: Tensor,
    blocks: Sequence[Sequence[Layer]],
    shortcuts: Sequence[Identity | Conv | None],
    coef: Tensor | None = None,
    next_coef: bool = False,
) -> tuple[Tensor, Tensor | None, list[Statistics]]:
    """Pre-activation blocks one after the other, differentiable.

    Args:
        x, coef, next_coef: see `preact_block`.
        blocks: the layers of each block.
        shortcuts: of each block: None, ``Identity()`` for its input, or a `Conv` of its first rectified BatchNorm.

    Returns:
        As `preact_block`.

    Raises:
        RuntimeError, ValueError: as `preact_block`; ValueError for no block, for another number of shortcuts than of
            blocks and for an `Identity` with a stride or with channels of zeros.
    """
    planned = planned_preact(x, blocks, shortcuts, coef, next_coef)
    out, coefs = planned.run(x, known=coef)
    return out, coefs[-1] if next_coef else None, planned.statistics(coefs)


def planned_preact(
    x: Tensor,
    blocks: Sequence[Sequence[Layer]],
    shortcuts: Sequence[Identity | Conv | None],
    coef: Tensor | None = None,
    next_coef: bool = False,
) -> Planned:
    """`preact_chain` of tensors like x and coef.

    Raises:
        RuntimeError, ValueError: see `preact_chain`.
    """
    counts = _check(x, blocks, shortcuts, coef)
    every_layer = [layer for layers in blocks for layer in layers]
    training = [layer.norm.running_mean is None for layer in every_layer]
    nodes: list[Node] = []
    parameters: list[Tensor | None] = []
    number = 0
    for layers, shortcut in zip(blocks, shortcuts):
        if isinstance(shortcut, Identity):
            nodes.append(Open())
        for place, layer in enumerate(layers):
            nodes.append(Norm(layer.norm.eps, training[number], layer.norm.act))
            parameters += norm_vectors(layer.norm)
            if place == 0 and isinstance(shortcut, Conv):
                nodes.append(Open(branch=(_node(shortcut, moments=False),)))
                parameters.append(shortcut.weight)
            number += 1
            last = number == len(every_layer)
            moments = next_coef if last else training[number]
            adds = place == len(layers) - 1 and shortcut is not None
            nodes.append(_node(layer, moments, adds, kept=not last))
            parameters.append(layer.weight)
    if next_coef:
        nodes.append(Describe())
    return Planned(Plan(tuple(nodes), group_of([layer.norm for layer in every_layer])), parameters, counts)


def _node(conv: Layer | Conv, moments: bool, adds: bool = False, kept: bool = True) -> ConvNode:
    return ConvNode(conv.stride, conv.pad, conv.dilation, moments, adds, kept)


def _check(
    x: Tensor, blocks: Sequence[Sequence[Layer]], shortcuts: Sequence[Identity | Conv | None], coef: Tensor | None
) -> list[int]:
    """Check the input; pixels that each layer's BatchNorm sees."""
    if not blocks or not all(blocks):
        raise ValueError("a pre-activation block has at least one layer")
    if len(shortcuts) != len(blocks):
        raise ValueError(f"{len(shortcuts)} shortcuts for {len(blocks)} pre-activation blocks")
    if any(isinstance(shortcut, Identity) and shortcut != Identity() for shortcut in shortcuts):
        raise ValueError("the identity of a pre-activation block has no stride and adds no channels")
    projections = [shortcut for shortcut in shortcuts if isinstance(shortcut, Conv)]
    check_input(x, [layer.weight for layers in blocks for layer in layers] + [conv.weight for conv in projections])
    shape, counts = tuple(x.shape), []
    for layers, shortcut in zip(blocks, shortcuts):
        before = shape
        for layer in layers:
            check_norm(layer.norm, shape, x.device)
            counts.append(pixels(shape))
            shape = conv_shape(shape, layer)
        if shortcut is not None:
            check_shortcut_shape(conv_shape(before, shortcut) if isinstance(shortcut, Conv) else before, shape)
    if coef is not None:
        check_coef(coef, x.shape[3], x.device)
    return counts
