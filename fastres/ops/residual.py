"""Residual blocks as one operation: any number of convolutions with BatchNorm, a shortcut, one ReLU at the end.

One layer without a shortcut is Conv-BatchNorm-ReLU, two with one are the basic block, three are the bottleneck (He et
al. 2015). Normalisation and ReLU happen in the prologue of the next convolution, statistics in the epilogue of the
last, so only the convolutions' own outputs exist: for backward x, y1 ... yn and the result are kept, never a normalised
or ReLU'd copy. Blocks that follow one another are one operation too, since passes over memory disappear
between them: the next block's first convolution yields with its data gradient the masked gradient and BatchNorm sums of
the block before, and where it is 1x1 behind an identity shortcut it ends that block as it reads it.

A shortcut without parameters may take every few pixels and add channels of zeros (`Identity`): it is read where the
block ends and its gradient added where backward ends, at those pixels, with no tensor of its own. The gradient of a
strided 1x1 projection likewise exists for the pixels it reads alone.

In units of M*w elements a bottleneck with widths w and 4w and an identity shortcut moves 24 forward and 58 backward, 20
and 50 inside a chain, where eager PyTorch moves 54 and 84.
"""

from collections.abc import Sequence

from torch import Tensor

from fastres.ops.fused import Planned
from fastres.ops.layers import (
    Identity,
    Layer,
    Shape,
    Statistics,
    check_input,
    check_shortcut,
    check_shortcut_shape,
    group_of,
    identity_shape,
    layer_shape,
    norm_vectors,
    pixels,
)
from fastres.ops.nodes import Conv, End, Node, Norm, Open
from fastres.ops.plan import Plan


def residual_block(
    x: Tensor,
    layers: Sequence[Layer],
    shortcut: Tensor | Layer | Identity | None = None,
    relu: bool = True,
    recompute: bool = False,
) -> tuple[Tensor, list[Statistics]]:
    """``relu(bn_n(conv_n(... relu(bn_1(conv_1(x))))) + shortcut)``, differentiable: a `residual_chain` of one block."""
    return residual_chain(x, [layers], shortcut, relu, recompute)


def residual_chain(
    x: Tensor,
    blocks: Sequence[Sequence[Layer]],
    shortcut: Tensor | Layer | Identity | None = None,
    relu: bool = True,
    recompute: bool = False,
    shortcuts: Sequence[Identity | Layer] | None = None,
) -> tuple[Tensor, list[Statistics]]:
    """A residual block ``relu(bn_n(conv_n(... relu(bn_1(conv_1(x))))) + shortcut)`` and more of them, differentiable.

    Args:
        x: [N, H, W, C].
        blocks: the convolutions of each block in order.
        shortcut: of the first block: None, a tensor of its result's shape, a `Layer` that projects x, or x itself or an
            `Identity`, whose gradient joins x's in the last kernel of backward.
        relu: whether the last block's sum goes through ReLU, as all others' do.
        recompute: whether each block's last convolution, and the projection, are computed again in backward, which
            saves the memory of their outputs.
        shortcuts: of the blocks from the second on, a `Layer` where its input is projected; None: each one's input
            itself.

    Returns:
        The result [N, H', W', C'] and the `Statistics` of each layer in order, those of projections last.

    Raises:
        RuntimeError, ValueError: as `torch.nn.functional.conv2d` and `batch_norm` raise them; ValueError for a block
            without layers, for another number of shortcuts than there are further blocks, and for GELU behind the
            addition of a shortcut that is not the block's input as it is, or a projection of it.
    """
    shortcut = Identity() if shortcut is x else shortcut
    planned = planned_chain(x, blocks, shortcut, relu, recompute, shortcuts)
    out, coefs = planned.run(x, shortcut if isinstance(shortcut, Tensor) else None)
    statistics = iter(planned.statistics(coefs))
    projected, own = [], []
    for opened, layers in zip(_every(shortcut, shortcuts, blocks), blocks):
        projected += [next(statistics)] if isinstance(opened, Layer) else []
        own += [next(statistics) for _ in layers]
    return out, own + projected


def planned_chain(
    x: Tensor,
    blocks: Sequence[Sequence[Layer]],
    shortcut: Tensor | Layer | Identity | None = None,
    relu: bool = True,
    recompute: bool = False,
    shortcuts: Sequence[Identity | Layer] | None = None,
) -> Planned:
    """`residual_chain` of tensors like x, and like ``shortcut`` if that is one; its BatchNorms are as they run.

    A projection's comes before its block's. The shortcut x itself is ``Identity()``.

    Raises:
        RuntimeError, ValueError: see `residual_chain`.
    """
    every = _every(shortcut, shortcuts, blocks)
    shapes = _check(x, blocks, every)
    nodes: list[Node] = []
    for index, layers in enumerate(blocks):
        opened = every[index]
        if opened is not None:
            nodes.append(_opening(opened, recompute))
        for place, layer in enumerate(layers):
            nodes += _layer_nodes(layer, kept=not recompute or place < len(layers) - 1)
        rectified = relu or index < len(blocks) - 1
        kept = opened is None or type(opened) is Layer or (type(opened) is Identity and opened == Identity())
        if rectified and layers[-1].norm.act != "relu" and not kept:
            raise ValueError(
                f"act is {layers[-1].norm.act!r} behind the addition of a shortcut that is neither the block's input "
                "nor a projection of it: take relu=False, and the activation of the result"
            )
        nodes.append(End(opened is not None, rectified))
    every_layer = [
        one for opened, layers in zip(every, blocks) for one in (*_projections(opened), *layers)
    ]  # as they run
    plan = Plan(tuple(nodes), group_of([layer.norm for layer in every_layer]), recompute)
    parameters = [tensor for layer in every_layer for tensor in (layer.weight, *norm_vectors(layer.norm))]
    return Planned(plan, parameters, [pixels(shape) for shape in shapes])


Opening = Tensor | Layer | Identity | None


def _every(
    shortcut: Opening, shortcuts: Sequence[Identity | Layer] | None, blocks: Sequence[Sequence[Layer]]
) -> list[Opening]:
    """The shortcut of each block."""
    others = [Identity()] * (len(blocks) - 1) if shortcuts is None else shortcuts
    return [shortcut, *others]


def _projections(shortcut: Opening) -> list[Layer]:
    return [shortcut] if isinstance(shortcut, Layer) else []


def _opening(shortcut: Tensor | Layer | Identity, recompute: bool) -> Open:
    if isinstance(shortcut, Layer):
        return Open(branch=tuple(_layer_nodes(shortcut, not recompute)))
    if isinstance(shortcut, Identity):
        return Open(shortcut.stride)
    return Open(given=True)


def _layer_nodes(layer: Layer, kept: bool) -> list[Node]:
    training = layer.norm.running_mean is None
    conv = Conv(layer.stride, layer.pad, layer.dilation, moments=training, kept=kept)
    return [conv, Norm(layer.norm.eps, training, layer.norm.act)]


def _check(x: Tensor, blocks: Sequence[Sequence[Layer]], shortcuts: Sequence[Opening]) -> list[Shape]:
    """Check the input and the shortcut of each block; shape of each layer's output, as they run."""
    if not all([blocks, *blocks]):
        raise ValueError("a residual block has at least one layer")
    if len(shortcuts) != len(blocks):
        raise ValueError(f"{len(shortcuts) - 1} shortcuts for {len(blocks) - 1} blocks behind the first")
    projections = [layer for shortcut in shortcuts for layer in _projections(shortcut)]
    check_input(x, [layer.weight for layers in (*blocks, projections) for layer in layers])
    shape, shapes = tuple(x.shape), []
    for layers, shortcut in zip(blocks, shortcuts):
        before = shape
        projected = [layer_shape(before, layer) for layer in _projections(shortcut)]
        shapes += projected
        for layer in layers:
            shape = layer_shape(shape, layer)
            shapes.append(shape)
        if isinstance(shortcut, Identity):
            check_shortcut_shape(identity_shape(before, shortcut), shape)
        elif isinstance(shortcut, Layer):
            check_shortcut_shape(projected[0], shape)
        elif shortcut is not None:
            check_shortcut(shortcut, shape, x)
    return shapes
