"""Pre-activation residual blocks (He et al. 2016) as one operation.

``shortcut + conv_n(relu(bn_n(... conv_1(relu(bn_1(x))))))``: BatchNorm and ReLU stand before each convolution, so all
of them are prologues, and the shortcut is added in the last convolution's epilogue, which also reduces the statistics
that the next block's first BatchNorm needs. Kept for backward: x and y1 ... y(n-1).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastres.kernels.types import Moments
from fastres.ops import again, plain
from fastres.ops.aten import statistics_dtype
from fastres.ops.coefficients import backward_coefficients, coefficients, rows
from fastres.ops.layers import (
    Conv,
    Layer,
    Statistics,
    check_coef,
    check_input,
    check_norm,
    check_shortcut_shape,
    contiguous,
    conv_shape,
    dense,
    dilation_of,
    dilations_of,
    group_of,
    in_autocast,
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
    identity, projection = shortcut is x, isinstance(shortcut, Conv)
    convs = [*layers, shortcut] if projection else list(layers)
    counts = _check(x, layers, shortcut, coef)
    x = in_autocast(x).contiguous()
    if plain.is_needed(x):
        return plain.preact_block(x, layers, x if identity else shortcut, next_coef)
    parameters = [t for layer in layers for t in norm_vectors(layer.norm)] + [c.weight for c in convs]
    recording = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *parameters))
    out, *coefs = _PreactBlock.apply(
        x,
        None if coef is None else coef.contiguous(),
        tuple(conv.stride for conv in convs),
        tuple(side for conv in convs for side in conv.pad),
        tuple(layer.norm.eps for layer in layers),
        identity,
        projection,
        next_coef,
        recording,
        group_of([layer.norm for layer in layers]),
        dilations_of(convs),
        *parameters,
    )
    coefs, out_coef = (coefs[:-1], coefs[-1]) if next_coef else (coefs, None)  # torch.compile of 2.11 has no pop here
    return out, out_coef, [Statistics(coef, count) for coef, count in zip(coefs, counts)]


def _check(x: Tensor, layers: Sequence[Layer], shortcut: Tensor | Conv | None, coef: Tensor | None) -> list[int]:
    """Check the input; pixels that each layer's BatchNorm sees."""
    projection = isinstance(shortcut, Conv)
    if not layers:
        raise ValueError("a pre-activation block has at least one layer")
    if not (projection or shortcut is None or shortcut is x):
        raise ValueError("the shortcut of a pre-activation block is x itself, a Conv or None")
    check_input(x, [conv.weight for conv in ([*layers, shortcut] if projection else layers)])
    shape, counts = tuple(x.shape), []
    for layer in layers:
        check_norm(layer.norm, shape, x.device)
        counts.append(pixels(shape))
        shape = conv_shape(shape, layer)
    if shortcut is not None:
        check_shortcut_shape(conv_shape(tuple(x.shape), shortcut) if projection else tuple(x.shape), shape)
    if coef is not None:
        check_coef(coef, x.shape[3], x.device)
    return counts


class _PreactBlock(torch.autograd.Function):
    """``parameters``: gamma, beta, running mean and running variance of each layer, then all weights."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        coef: Tensor | None,
        strides: tuple[int, ...],
        pads: tuple[int, ...],
        eps: tuple[float, ...],
        identity: bool,
        projection: bool,
        next_coef: bool,
        recording: bool,
        group: str | None,
        dilations: tuple[int, ...] | None,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, ...]:
        n = len(eps)
        norms, weights = list(parameters[: 4 * n]), [nhwc_weight(w, x.dtype) for w in parameters[4 * n :]]
        kinds = identity, projection, next_coef, recording, group, dilations
        out, *rest = preact_forward(x, coef, weights, norms, strides, pads, eps, *kinds)
        ys, coefs = rest[: (n - 1) * recording], rest[(n - 1) * recording :]
        ctx.save_for_backward(x, *weights, *norms[::4], *coefs[:n], *ys)
        ctx.mark_non_differentiable(*coefs)
        ctx.geometry = strides, pads
        ctx.shortcut, ctx.group, ctx.dilations = (identity, projection), group, dilations
        ctx.trained = [mean is None for mean in norms[2::4]]
        ctx.dtypes = [None if p is None else p.dtype for p in parameters]
        ctx.given, ctx.eps = again.given(parameters) if recording else None, eps
        return out, *coefs

    @staticmethod
    def backward(ctx: Any, dout: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        dout = dense(dout)
        n, (_, projection) = len(ctx.trained), ctx.shortcut
        x, *rest = contiguous(ctx.saved_tensors)
        if again.is_differentiated(dout):
            (strides, pads), (identity, _) = ctx.geometry, ctx.shortcut
            needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[11:]]
            geometry = dict(strides=strides, pads=pads, dilations=ctx.dilations, eps=ctx.eps)
            shortcut = dict(identity=identity, projection=projection)
            dx, *parameters = again.preact_block(ctx.given, x, dout, needs, group=ctx.group, **geometry, **shortcut)
            return dx, *[None] * 10, *parameters
        weights, rest = rest[: n + projection], rest[n + projection :]
        need_x, need_parameters = ctx.needs_input_grad[0], ctx.needs_input_grad[11:]
        need_weights = need_parameters[4 * n :]
        found = preact_backward(
            dout,
            x,
            rest[2 * n :],
            rest[n : 2 * n],
            weights,
            rest[:n],
            *ctx.geometry,
            ctx.trained,
            *ctx.shortcut,
            [need_x, *need_weights],
            ctx.group,
            ctx.dilations,
        )
        grads = iter(found)  # in the order of needs
        norm_grads = next(grads)
        dx = next(grads) if need_x else None
        channels = [c.shape[1] for c in rest[n : 2 * n] for _ in range(2)]
        pairs = norm_grads.split(channels)
        parameters = []
        for i in range(n):
            for j in range(2):
                needed = need_parameters[4 * i + j]
                parameters.append(pairs[2 * i + j].to(ctx.dtypes[4 * i + j]) if needed else None)
            parameters += [None, None]
        for need, dtype in zip(need_weights, ctx.dtypes[4 * n :]):
            parameters.append(weight_grad(next(grads), dtype) if need else None)
        return dx, *[None] * 10, *parameters


@operation("preact_forward")
def preact_forward(
    x: Tensor,
    coef: Tensor | None,
    weights: list[Tensor],
    norms: list[Tensor | None],
    strides: list[int],
    pads: list[int],
    eps: list[float],
    identity: bool,
    projection: bool,
    next_coef: bool,
    recording: bool,
    group: str | None = None,
    dilations: list[int] | None = None,
) -> list[Tensor]:
    """The forward schedule: the result, with ``recording`` y1 ... y(n-1), every layer's coef, and the result's.

    Args:
        coef: mean and biased variance of x, then three more rows; None: reduced from x where needed.
        norms: gamma, beta, running mean and running variance of each layer; no running mean: batch statistics.
        pads: top, left, bottom, right of each convolution, the projection's last.
        identity, projection: the shortcut is x, or the last convolution of the rectified x, or there is none.
        group: name of the process group whose ranks take batch statistics together.
        dilations: of each convolution; None: all 1.
    """
    p = primitives(x)
    layers = len(eps)

    def conv(i: int, a: Tensor, coef: Tensor, **options: Any) -> tuple[Tensor, Moments | None]:
        geometry = weights[i], strides[i], pad_of(pads, i)
        return p.conv(a, *geometry, coef=coef, **options, dilation=dilation_of(dilations, i))

    y, moments = x, None
    ys, coefs = [], []
    for i in range(layers):
        known = None if i else coef
        coefs.append(coefficients(p, y, *norms[4 * i : 4 * i + 4], eps[i], moments, known, group))
        last = i == layers - 1
        shortcut = x if identity and last else None
        if projection and last:
            shortcut, _ = conv(layers, x, coefs[0], moments=False)
        wanted = next_coef if last else norms[4 * (i + 1) + 2] is None
        y, moments = conv(i, y, coefs[i], residual=shortcut, moments=wanted)
        ys.append(y)
    kept = ys[:-1] if recording else []
    return [y, *kept, *coefs] + ([p.finalize(moments, None, None, 0.0)] if next_coef else [])


@preact_forward.register_fake
def _(
    x, coef, weights, norms, strides, pads, eps, identity, projection, next_coef, recording, group=None, dilations=None
):
    y, ys = x, []
    for i in range(len(eps)):
        geometry = strides[i], pad_of(pads, i), dilation_of(dilations, i)
        hw = output_hw(y.shape[1:3], weights[i].shape[1:3], *geometry)
        y = x.new_empty(x.shape[0], *hw, weights[i].shape[0])
        ys.append(y)
    statistics = statistics_dtype(x.dtype)
    coefs = [x.new_empty(rows(mean, group), a.shape[3], dtype=statistics) for a, mean in zip([x, *ys], norms[2::4])]
    if next_coef:
        coefs.append(x.new_empty(5, y.shape[3], dtype=statistics))
    return [y, *(ys[:-1] if recording else []), *coefs]


@operation("preact_backward")
def preact_backward(
    dout: Tensor,
    x: Tensor,
    ys: list[Tensor],
    coefs: list[Tensor],
    weights: list[Tensor],
    gammas: list[Tensor | None],
    strides: list[int],
    pads: list[int],
    trained: list[bool],
    identity: bool,
    projection: bool,
    needs: list[bool],
    group: str | None = None,
    dilations: list[int] | None = None,
) -> list[Tensor]:
    """The backward schedule, see `preact_forward`.

    Args:
        needs: whether x and each weight need a gradient.

    Returns:
        The gradients of gamma and beta of every layer in one vector, then those of ``needs``.
    """
    p = primitives(x)
    layers = len(coefs)
    need_x, *need_weights = needs
    norm_grads, dws = [None] * (2 * layers), [None] * len(weights)
    dz, y, abc = dout, None, None
    for i in reversed(range(layers)):
        below, residual, step = ys[i - 1] if i else x, None, 1
        if i == 0 and projection:
            geometry = weights[layers], strides[layers], pad_of(pads, layers)
            residual, dws[layers], step = projection_backward(
                p,
                dout,
                None,
                None,
                x,
                coefs[0],
                *geometry,
                True,
                need_weights[layers],
                dilation_of(dilations, layers),
            )
        dz, sums, dws[i] = p.conv_backward(
            dz,
            y,
            abc,
            below,
            coefs[i],
            weights[i],
            strides[i],
            pad_of(pads, i),
            residual,
            need_dw=need_weights[i],
            residual_stride=step,
            dilation=dilation_of(dilations, i),
        )
        y = below if trained[i] else None
        abc, dgamma, dbeta = backward_coefficients(p, sums, coefs[i], gammas[i], pixels(below.shape), trained[i], group)
        norm_grads[2 * i : 2 * i + 2] = dgamma, dbeta
    dx = [p.bn_backward_apply(dz, y, abc, dout if identity else None)] if need_x else []
    return [torch.cat(norm_grads), *dx, *(dw for dw in dws if dw is not None)]


@preact_backward.register_fake
def _(
    dout, x, ys, coefs, weights, gammas, strides, pads, trained, identity, projection, needs, group=None, dilations=None
):
    statistics = statistics_dtype(x.dtype)
    need_x, *need_weights = needs
    dws = [torch.empty_like(w, dtype=statistics) for w, need in zip(weights, need_weights) if need]
    norm_grads = x.new_empty(2 * sum(c.shape[1] for c in coefs), dtype=statistics)
    return [norm_grads] + [torch.empty_like(x)] * need_x + dws
