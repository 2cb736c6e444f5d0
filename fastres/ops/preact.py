"""Pre-activation residual blocks (He et al. 2016) as one operation.

``shortcut + conv_n(relu(bn_n(... conv_1(relu(bn_1(x))))))``: BatchNorm and ReLU stand before each convolution, so all
of them are prologues, and the shortcut is added in the last convolution's epilogue, which also reduces the statistics
that the next block's first BatchNorm needs. Kept for backward: x and y1 ... y(n-1).
"""

from collections.abc import Sequence

from torch import Tensor

from fastres.ops.fused import fused
from fastres.ops.layers import (
    Conv,
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
    """Pre-activation block, differentiable.

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
    counts = _check(x, layers, shortcut, coef)
    projection = [shortcut] if isinstance(shortcut, Conv) else []
    training = [layer.norm.running_mean is None for layer in layers]
    nodes: list[Node] = [] if shortcut is not x else [Open()]
    parameters: list[Tensor | None] = []
    for place, layer in enumerate(layers):
        nodes.append(Norm(layer.norm.eps, training[place]))
        parameters += norm_vectors(layer.norm)
        if place == 0 and projection:
            nodes.append(Open(branch=(_node(projection[0], moments=False),)))
            parameters.append(projection[0].weight)
        last = place == len(layers) - 1
        moments = next_coef if last else training[place + 1]
        nodes.append(_node(layer, moments, adds=last and shortcut is not None, kept=not last))
        parameters.append(layer.weight)
    if next_coef:
        nodes.append(Describe())
    plan = Plan(tuple(nodes), group_of([layer.norm for layer in layers]))
    out, coefs = fused(plan, x, parameters, known=coef)
    statistics = [Statistics(coef, count) for coef, count in zip(coefs, counts)]
    return out, coefs[len(layers)] if next_coef else None, statistics


def _node(conv: Layer | Conv, moments: bool, adds: bool = False, kept: bool = True) -> ConvNode:
    return ConvNode(conv.stride, conv.pad, conv.dilation, moments, adds, kept)


def _check(x: Tensor, layers: Sequence[Layer], shortcut: Tensor | Conv | None, coef: Tensor | None) -> list[int]:
    """Check the input; pixels that each layer's BatchNorm sees."""
    projection = [shortcut] if isinstance(shortcut, Conv) else []
    if not layers:
        raise ValueError("a pre-activation block has at least one layer")
    if not (projection or shortcut is None or shortcut is x):
        raise ValueError("the shortcut of a pre-activation block is x itself, a Conv or None")
    check_input(x, [layer.weight for layer in layers] + [conv.weight for conv in projection])
    shape, counts = tuple(x.shape), []
    for layer in layers:
        check_norm(layer.norm, shape, x.device)
        counts.append(pixels(shape))
        shape = conv_shape(shape, layer)
    if shortcut is not None:
        check_shortcut_shape(conv_shape(tuple(x.shape), projection[0]) if projection else tuple(x.shape), shape)
    if coef is not None:
        check_coef(coef, x.shape[3], x.device)
    return counts
