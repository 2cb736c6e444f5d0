"""Residual blocks as one operation: any number of convolutions with BatchNorm, a shortcut, one ReLU at the end.

One layer without a shortcut is Conv-BatchNorm-ReLU, two with one are the basic block, three are the bottleneck (He et
al. 2015). Normalisation and ReLU happen in the prologue of the next convolution, statistics in the epilogue of the
last, so only the convolutions' own outputs exist: for backward x, y1 ... yn and the result are kept, never a normalised
or ReLU'd copy. Blocks with identity shortcuts that follow one another are one operation too, since two passes over
memory disappear between them: the next block's first 1x1 convolution ends the block before as it reads it, and its data
gradient yields that block's masked gradient and BatchNorm sums as it writes it.

A shortcut without parameters may take every few pixels and add channels of zeros (`Identity`): it is read where the
block ends and its gradient added where backward ends, at those pixels, with no tensor of its own. The gradient of a
strided 1x1 projection likewise exists for the pixels it reads alone.

In units of M*w elements a bottleneck with widths w and 4w and an identity shortcut moves 24 forward and 58 backward, 20
and 50 inside a chain, where eager PyTorch moves 54 and 84.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fastres.kernels.geometry import is_pointwise
from fastres.ops import again, plain
from fastres.ops.aten import statistics_dtype
from fastres.ops.coefficients import backward_coefficients, coefficients, rows
from fastres.ops.layers import (
    Identity,
    Layer,
    Shape,
    Statistics,
    check_input,
    check_shortcut,
    check_shortcut_shape,
    contiguous,
    dense,
    dilation_of,
    dilations_of,
    group_of,
    identity_shape,
    in_autocast,
    layer_shape,
    nhwc_weight,
    norm_vectors,
    output_hw,
    pad_of,
    pixels,
    weight_grad,
)
from fastres.ops.operation import operation
from fastres.ops.projection import projection_backward
from fastres.ops.select import primitives

KEEP = ("all", "fewer")
# The channels of a convolution that may end the block before: with more, several programs would each read all of it.
JOINED_CHANNELS = 128


def residual_block(
    x: Tensor,
    layers: Sequence[Layer],
    shortcut: Tensor | Layer | Identity | None = None,
    relu: bool = True,
    keep: str = "all",
) -> tuple[Tensor, list[Statistics]]:
    """``relu(bn_n(conv_n(... relu(bn_1(conv_1(x))))) + shortcut)``, differentiable: a `residual_chain` of one block."""
    return residual_chain(x, [layers], shortcut, relu, keep)


def residual_chain(
    x: Tensor,
    blocks: Sequence[Sequence[Layer]],
    shortcut: Tensor | Layer | Identity | None = None,
    relu: bool = True,
    keep: str = "all",
    identities: Sequence[Identity] | None = None,
) -> tuple[Tensor, list[Statistics]]:
    """A residual block ``relu(bn_n(conv_n(... relu(bn_1(conv_1(x))))) + shortcut)`` and more of them, differentiable.

    Args:
        x: [N, H, W, C].
        blocks: the convolutions of each block in order.
        shortcut: of the first block: None, a tensor of its result's shape, a `Layer` that projects x, or x itself or an
            `Identity`, whose gradient joins x's in the last kernel of backward.
        relu: whether the last block's sum goes through ReLU, as all others' do.
        keep: what stays for backward: ``"all"`` convolution outputs, or ``"fewer"``: each block's last one, and the
            projection's, are computed again in backward.
        identities: the shortcuts of the blocks from the second on; None: each one's input itself.

    Returns:
        The result [N, H', W', C'] and the `Statistics` of each layer in order, the projection's last.

    Raises:
        RuntimeError, ValueError: as `torch.nn.functional.conv2d` and `batch_norm` raise them; ValueError for a block
            without layers and for another number of identities than there are further blocks.
    """
    if keep not in KEEP:
        raise ValueError(f"keep is {keep!r}: choose {' or '.join(KEEP)}")
    shortcut = Identity() if shortcut is x else shortcut
    identity, projection = isinstance(shortcut, Identity), isinstance(shortcut, Layer)
    if identities is None:
        identities = [Identity()] * (len(blocks) - 1)
    every_layer = [layer for layers in blocks for layer in layers] + ([shortcut] if projection else [])
    shapes = _check(x, blocks, shortcut, identities)
    x = in_autocast(x).contiguous()
    added = None if identity or projection or shortcut is None else in_autocast(shortcut).contiguous()
    if plain.is_needed(x, added):
        return plain.residual_chain(x, blocks, shortcut if added is None else added, relu, identities)
    parameters = [tensor for layer in every_layer for tensor in (layer.weight, *norm_vectors(layer.norm))]
    recording = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, added, *parameters))
    out, *coefs = _ResidualChain.apply(
        x,
        added,
        tuple(map(len, blocks)),
        tuple(layer.stride for layer in every_layer),
        tuple(side for layer in every_layer for side in layer.pad),
        tuple(layer.norm.eps for layer in every_layer),
        (shortcut.stride if identity else 1, *(other.stride for other in identities)),
        identity,
        projection,
        relu,
        recording,
        keep == "all",
        group_of([layer.norm for layer in every_layer]),
        dilations_of(every_layer),
        *parameters,
    )
    return out, [Statistics(coef, pixels(shape)) for coef, shape in zip(coefs, shapes)]


def _check(
    x: Tensor,
    blocks: Sequence[Sequence[Layer]],
    shortcut: Tensor | Layer | Identity | None,
    identities: Sequence[Identity],
) -> list[Shape]:
    """Check the input; shape of each layer's output, the projection's last."""
    if not all([blocks, *blocks]):
        raise ValueError("a residual block has at least one layer")
    if len(identities) != len(blocks) - 1:
        raise ValueError(f"{len(identities)} identities for {len(blocks) - 1} blocks behind the first")
    projection = [shortcut] if isinstance(shortcut, Layer) else []
    check_input(x, [layer.weight for layers in (*blocks, projection) for layer in layers])
    shape, shapes = tuple(x.shape), []
    projected = [layer_shape(shape, layer) for layer in projection]
    for index, layers in enumerate(blocks):
        before = shape
        for layer in layers:
            shape = layer_shape(shape, layer)
            shapes.append(shape)
        if index > 0:
            check_shortcut_shape(identity_shape(before, identities[index - 1]), shape)
        elif isinstance(shortcut, Identity):
            check_shortcut_shape(identity_shape(before, shortcut), shape)
        elif projection:
            check_shortcut_shape(projected[0], shape)
        elif shortcut is not None:
            check_shortcut(shortcut, shape, x)
    return shapes + projected


class _ResidualChain(torch.autograd.Function):
    """``parameters``: weight, gamma, beta, running mean and running variance of each layer, the projection last."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        added: Tensor | None,
        depths: tuple[int, ...],
        strides: tuple[int, ...],
        pads: tuple[int, ...],
        eps: tuple[float, ...],
        steps: tuple[int, ...],
        identity: bool,
        projection: bool,
        relu: bool,
        recording: bool,
        keep_all: bool,
        group: str | None,
        dilations: tuple[int, ...] | None,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, ...]:
        weights = [nhwc_weight(weight, x.dtype) for weight in parameters[::5]]
        norms = [tensor for i in range(0, len(parameters), 5) for tensor in parameters[i + 1 : i + 5]]
        kinds = identity, projection
        options = relu, recording, keep_all, group, dilations
        out, *rest = residual_forward(x, added, weights, norms, depths, strides, pads, eps, steps, *kinds, *options)
        saved, coefs = rest[: -len(weights)], rest[-len(weights) :]
        ctx.save_for_backward(x, out if relu else None, *weights, *parameters[1::5], *coefs, *saved)
        ctx.mark_non_differentiable(*coefs)
        ctx.geometry = depths, strides, pads, steps
        ctx.kinds, ctx.group, ctx.dilations = (*kinds, keep_all), group, dilations
        ctx.trained = [mean is None for mean in parameters[3::5]]
        ctx.dtypes = [None if p is None else p.dtype for p in parameters]
        ctx.given = again.given(parameters) if recording else None
        ctx.form = eps, relu, added is not None
        return out, *coefs

    @staticmethod
    def backward(ctx: Any, dout: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        dout = dense(dout)
        n, inner = len(ctx.trained), len(ctx.geometry[0]) - 1
        x, out, *rest = contiguous(ctx.saved_tensors)
        if again.is_differentiated(dout):
            return _ResidualChain._differentiable(ctx, x, rest[3 * n] if inner else out, dout)
        weights, gammas, coefs, saved = rest[:n], rest[n : 2 * n], rest[2 * n : 3 * n], rest[3 * n :]
        need_x, need_added, *need_parameters = (*ctx.needs_input_grad[:2], *ctx.needs_input_grad[14:])
        need_weights = need_parameters[::5]
        found = residual_backward(
            dout,
            out,
            [x, *saved[:inner]],
            saved[inner:],
            coefs,
            weights,
            gammas,
            *ctx.geometry,
            ctx.trained,
            *ctx.kinds,
            [need_x, need_added, *need_weights],
            ctx.group,
            ctx.dilations,
        )
        grads = iter(found)  # in the order of needs
        norm_grads = next(grads)
        dx = next(grads) if need_x else None
        dadded = next(grads) if need_added else None
        channels = [weight.shape[0] for weight in weights for _ in range(2)]
        pairs = norm_grads.split(channels)
        parameters = []
        for i in range(n):
            weight_dtype, gamma_dtype, beta_dtype = ctx.dtypes[5 * i : 5 * i + 3]
            parameters += [
                weight_grad(next(grads), weight_dtype) if need_weights[i] else None,
                pairs[2 * i].to(gamma_dtype) if need_parameters[5 * i + 1] else None,
                pairs[2 * i + 1].to(beta_dtype) if need_parameters[5 * i + 2] else None,
                None,
                None,
            ]
        return dx, dadded, *[None] * 12, *parameters

    @staticmethod
    def _differentiable(ctx: Any, x: Tensor, result: Tensor | None, dout: Tensor) -> tuple[Tensor | None, ...]:
        """The same gradients; ``result`` is the first block's, None without ReLU."""
        (depths, strides, pads, steps), (eps, relu, has_added) = ctx.geometry, ctx.form
        identity, projection, _ = ctx.kinds
        dx, dadded, *parameters = again.residual_chain(
            ctx.given,
            x,
            result,
            dout,
            [*ctx.needs_input_grad[:2], *ctx.needs_input_grad[14:]],
            has_added,
            depths=depths,
            strides=strides,
            pads=pads,
            dilations=ctx.dilations,
            steps=steps,
            eps=eps,
            identity=identity,
            projection=projection,
            relu=relu,
            group=ctx.group,
        )
        return dx, dadded, *[None] * 12, *parameters


@operation("residual_forward")
def residual_forward(
    x: Tensor,
    added: Tensor | None,
    weights: list[Tensor],
    norms: list[Tensor | None],
    depths: list[int],
    strides: list[int],
    pads: list[int],
    eps: list[float],
    steps: list[int],
    identity: bool,
    projection: bool,
    relu: bool,
    recording: bool,
    keep_all: bool,
    group: str | None = None,
    dilations: list[int] | None = None,
) -> list[Tensor]:
    """The forward schedule.

    Args:
        norms: gamma, beta, running mean and running variance of each layer; no running mean: batch statistics.
        depths: layers of each block.
        pads: top, left, bottom, right of each layer.
        steps: of each block, stride of its shortcut where that is an `Identity`, else 1.
        identity, projection: the first block's shortcut is x, or the last layer of x; else it is ``added``, or nothing.
        recording, keep_all: what backward will need, see the returned.
        group: name of the process group whose ranks take batch statistics together.
        dilations: of each layer; None: all 1.

    Returns:
        The result; with ``recording`` the other blocks' results, then the layers' outputs, without ``keep_all`` not
        those of each block's last layer and of the projection; every layer's coef.
    """
    p = primitives(x)

    def coef_of(i: int, y: Tensor, moments: Any) -> Tensor:
        return coefficients(p, y, *norms[4 * i : 4 * i + 4], eps[i], moments, group=group)

    def conv(i: int, a: Tensor, below: Tensor | None) -> tuple[Tensor, Any]:
        options = dict(moments=norms[4 * i + 2] is None, dilation=dilation_of(dilations, i))
        return p.conv(a, weights[i], strides[i], pad_of(pads, i), coef=below, **options)

    def end(block: int, relu: bool) -> Tensor:
        return p.bn_add_relu(y, coef, shortcut, shortcut_coef, relu, steps[block])

    outs, ys, coefs = [], [], []
    shortcut, shortcut_coef, projected = x if identity else added, None, []
    if projection:
        last = len(weights) - 1
        shortcut, moments = conv(last, x, None)
        shortcut_coef = coef_of(last, shortcut, moments)
        projected = [shortcut]
    y, coef, first_coefs, i = x, None, [] if shortcut_coef is None else [shortcut_coef], 0
    for block, depth in enumerate(depths):
        for index in range(depth):
            if block == 0 or index > 0:
                y, moments = conv(i, y, coef)
            else:
                dense = shortcut is None or shortcut.shape == y.shape
                if dense and _joins(weights[i], strides[i], pad_of(pads, i)):
                    by_batch = norms[4 * i + 2] is None
                    out, y, moments = p.bn_add_relu_conv(y, coef, shortcut, shortcut_coef, weights[i], by_batch)
                else:
                    out = end(block - 1, True)
                    y, moments = conv(i, out, None)
                outs.append(out)
                shortcut, shortcut_coef = out, None
            coef = coef_of(i, y, moments)
            coefs.append(coef)
            if keep_all or index < depth - 1:
                ys.append(y)
            i += 1
    out = end(len(depths) - 1, relu)
    saved = [*outs, *ys, *(projected if keep_all else [])] if recording else []
    return [out, *saved, *coefs, *first_coefs]


@residual_forward.register_fake
def _(
    x,
    added,
    weights,
    norms,
    depths,
    strides,
    pads,
    eps,
    steps,
    identity,
    projection,
    relu,
    recording,
    keep_all,
    group=None,
    dilations=None,
):
    def output(a, i):
        geometry = strides[i], pad_of(pads, i), dilation_of(dilations, i)
        hw = output_hw(a.shape[1:3], weights[i].shape[1:3], *geometry)
        return x.new_empty(a.shape[0], *hw, weights[i].shape[0])

    a, outs, ys, i = x, [], [], 0
    for depth in depths:
        for index in range(depth):
            a = output(a, i)
            if keep_all or index < depth - 1:
                ys.append(a)
            i += 1
        outs.append(torch.empty_like(a))
    if projection and keep_all:
        ys.append(output(x, i))
    coefs = [
        x.new_empty(rows(mean, group), w.shape[0], dtype=statistics_dtype(x.dtype))
        for w, mean in zip(weights, norms[2::4])
    ]
    return [outs[-1], *([*outs[:-1], *ys] if recording else []), *coefs]


@operation("residual_backward")
def residual_backward(
    dout: Tensor,
    out: Tensor | None,
    inputs: list[Tensor],
    ys: list[Tensor],
    coefs: list[Tensor],
    weights: list[Tensor],
    gammas: list[Tensor | None],
    depths: list[int],
    strides: list[int],
    pads: list[int],
    steps: list[int],
    trained: list[bool],
    identity: bool,
    projection: bool,
    keep_all: bool,
    needs: list[bool],
    group: str | None = None,
    dilations: list[int] | None = None,
) -> list[Tensor]:
    """The backward schedule, see `residual_forward`; ``out`` None: the result had no ReLU.

    Args:
        inputs: of each block, x first.
        needs: whether x, the shortcut tensor and each weight need a gradient.

    Returns:
        The gradients of gamma and beta of every layer in one vector, then those of ``needs``.
    """
    p = primitives(dout)
    need_x, need_added, *need_weights = needs
    starts = [0, *accumulate(depths)]
    block_of = [block for block, depth in enumerate(depths) for _ in range(depth)] + [0] * projection
    ends = {starts[block + 1] - 1: block for block in range(len(depths))} | {starts[-1]: 0}
    again: dict[int, Tensor] = {}

    def kept(i: int) -> Tensor:
        """Output of layer i, of all or of those that do not end a block."""
        return ys[i if keep_all else i - block_of[i]]

    def below(i: int) -> tuple[Tensor, Tensor | None]:
        """What layer i read, and the coefficients that normalised it."""
        block = block_of[i]
        return (inputs[block], None) if i in (starts[block], starts[-1]) else (kept(i - 1), coefs[i - 1])

    # no function here calls one that calls it: such a circle would keep all tensors alive until the next collection
    def y_of(i: int) -> Tensor:
        """Output of layer i, kept or computed again."""
        if keep_all or i not in ends:
            return kept(i)
        if i not in again:
            a, coef = below(i)
            geometry = weights[i], strides[i], pad_of(pads, i)
            options = dict(moments=False, dilation=dilation_of(dilations, i))
            again[i] = p.conv(a, *geometry, coef=coef, **options)[0]
        return again[i]

    def layer(i: int, dz: Tensor, sums: Tensor) -> tuple:
        """BatchNorm's backward of layer i; what its convolution's backward takes first."""
        y = y_of(i) if trained[i] else None
        abc, dgamma, dbeta = backward_coefficients(p, sums, coefs[i], gammas[i], pixels(dz.shape), trained[i], group)
        norm_grads[2 * i : 2 * i + 2] = dgamma, dbeta
        return dz, y, abc, *below(i), weights[i], strides[i], pad_of(pads, i)

    def end_backward(
        block: int, dout: Tensor, out: Tensor | None, ours: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """dz with the sums of the last layer's BatchNorm, if it is there, and of the projection's."""
        i, projected = starts[block + 1] - 1, projection and block == 0
        if projected and not keep_all:
            dz, sums, _ = p.bn_add_relu_backward(dout, out, y_of(starts[-1]), coefs[-1], in_place=ours)
            return dz, None, sums
        shortcut = (y_of(starts[-1]), coefs[-1]) if projected else (None, None)
        return p.bn_add_relu_backward(dout, out, y_of(i), coefs[i], *shortcut, in_place=ours)

    norm_grads, dws = [None] * (2 * len(weights)), [None] * len(weights)
    dz, sums, shortcut_sums = end_backward(len(depths) - 1, dout, out, ours=False)
    for block in reversed(range(len(depths))):
        dshortcut, step = dz, steps[block]
        if projection and block == 0:
            last = starts[-1]
            dshortcut, dws[last], step = projection_backward(
                p,
                *layer(last, dz, shortcut_sums),
                need_x,
                need_weights[last],
                dilation_of(dilations, last),
            )
            again.pop(last, None)
            if not keep_all:  # only now, so that this output and the projection's never are in memory together
                i = starts[1] - 1
                dz, sums, _ = p.bn_add_relu_backward(dz, None, y_of(i), coefs[i], in_place=True)
        for i in reversed(range(*starts[block : block + 2])):
            residual = end = None
            if i == starts[block]:
                residual = dshortcut if block or identity or projection else None
                # the data gradient goes on through the end of the block below, but for a projection's own sums
                if block > 1 or (block == 1 and not projection):
                    end = (y_of(i - 1), coefs[i - 1])
            given = residual, need_x or i > 0, need_weights[i], end, 1 if residual is None else step
            options = dict(spare=True, dilation=dilation_of(dilations, i))
            dz, sums, dws[i] = p.conv_backward(*layer(i, dz, sums), *given, **options)
            again.pop(i, None)
            residual = given = None
        if projection and block == 1:
            dshortcut = None  # before what comes next needs memory
            dz, sums, shortcut_sums = end_backward(0, dz, inputs[1], ours=True)
    grads = [dz] * need_x + [dshortcut] * need_added + [dw for dw in dws if dw is not None]
    return [torch.cat(norm_grads), *grads]


@residual_backward.register_fake
def _(
    dout,
    out,
    inputs,
    ys,
    coefs,
    weights,
    gammas,
    depths,
    strides,
    pads,
    steps,
    trained,
    identity,
    projection,
    keep_all,
    needs,
    group=None,
    dilations=None,
):
    statistics = statistics_dtype(dout.dtype)
    need_x, need_added, *need_weights = needs
    dws = [torch.empty_like(w, dtype=statistics) for w, need in zip(weights, need_weights) if need]
    norm_grads = dout.new_empty(2 * sum(w.shape[0] for w in weights), dtype=statistics)
    first = inputs[1] if len(inputs) > 1 else dout
    return [norm_grads] + [torch.empty_like(inputs[0])] * need_x + [torch.empty_like(first)] * need_added + dws


def _joins(w: Tensor, stride: int, pad: tuple[int, ...]) -> bool:
    """Whether the convolution can end the block before as it reads it."""
    return stride == 1 and is_pointwise(w.shape[1:3], pad) and w.shape[0] <= JOINED_CHANNELS
