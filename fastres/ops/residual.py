"""Residual blocks as one operation: any number of convolutions with BatchNorm, a shortcut, one ReLU at the end.

One layer without a shortcut is Conv-BatchNorm-ReLU, two with one are the basic block, three are the bottleneck (He et
al. 2015). Normalisation and ReLU happen in the prologue of the next convolution, statistics in the epilogue of the
last, so only the convolutions' own outputs exist: for backward x, y1 ... yn and the result are kept, never a normalised
or ReLU'd copy. In units of M*w elements a bottleneck with widths w and 4w and an identity shortcut moves about 22
forward and 54 backward, where eager PyTorch moves 54 and 84.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastres.ops.aten import statistics_dtype
from fastres.ops.layers import (
    Layer,
    Shape,
    Statistics,
    check_input,
    check_shortcut,
    check_shortcut_shape,
    in_autocast,
    layer_shape,
    nhwc_weight,
    norm_vectors,
    output_hw,
    pixels,
    weight_grad,
)
from fastres.ops.select import primitives

KEEP = ("all", "fewer")


def residual_block(
    x: Tensor,
    layers: Sequence[Layer],
    shortcut: Tensor | Layer | None = None,
    relu: bool = True,
    keep: str = "all",
) -> tuple[Tensor, list[Statistics]]:
    """``relu(bn_n(conv_n(... relu(bn_1(conv_1(x))))) + shortcut)``, differentiable once.

    Args:
        x: [N, H, W, C].
        layers: the convolutions in order.
        shortcut: None, a tensor of the result's shape (x itself for the identity: its gradient then joins x's in the
            last kernel of backward) or a `Layer` that projects x.
        relu: whether the sum goes through ReLU.
        keep: what stays for backward: ``"all"`` convolution outputs, or ``"fewer"``: the last one, and the
            projection's, are computed again in backward.

    Returns:
        The result [N, H', W', C'] and the `Statistics` of each layer, the projection's last.

    Raises:
        RuntimeError, ValueError: as `torch.nn.functional.conv2d` and `batch_norm` raise them; ValueError for no layer.
    """
    if keep not in KEEP:
        raise ValueError(f"keep is {keep!r}: choose {' or '.join(KEEP)}")
    identity, projection = shortcut is x, isinstance(shortcut, Layer)
    every_layer = [*layers, shortcut] if projection else list(layers)
    shapes = _check(x, layers, shortcut)
    x = in_autocast(x).contiguous()
    added = None if identity or projection or shortcut is None else in_autocast(shortcut).contiguous()
    parameters = [tensor for layer in every_layer for tensor in (layer.weight, *norm_vectors(layer.norm))]
    recording = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, added, *parameters)
    )
    kept = 0 if not recording else len(layers) - 1 if keep == "fewer" else len(every_layer)
    out, *coefs = _ResidualBlock.apply(
        x,
        added,
        tuple(layer.stride for layer in every_layer),
        tuple(side for layer in every_layer for side in layer.pad),
        tuple(layer.norm.eps for layer in every_layer),
        identity,
        projection,
        relu,
        kept,
        *parameters,
    )
    return out, [Statistics(coef, pixels(shape)) for coef, shape in zip(coefs, shapes)]


def _check(x: Tensor, layers: Sequence[Layer], shortcut: Tensor | Layer | None) -> list[Shape]:
    """Check the input; shape of each layer's output, the projection's last."""
    if not layers:
        raise ValueError("a residual block has at least one layer")
    projection = isinstance(shortcut, Layer)
    check_input(x, [layer.weight for layer in ([*layers, shortcut] if projection else layers)])
    shape, shapes = tuple(x.shape), []
    for layer in layers:
        shape = layer_shape(shape, layer)
        shapes.append(shape)
    if projection:
        shapes.append(layer_shape(tuple(x.shape), shortcut))
        check_shortcut_shape(shapes[-1], shape)
    elif shortcut is not None:
        check_shortcut(shortcut, shape, x)
    return shapes


class _ResidualBlock(torch.autograd.Function):
    """``parameters``: weight, gamma, beta, running mean and running variance of each layer, the projection last."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        added: Tensor | None,
        strides: tuple[int, ...],
        pads: tuple[int, ...],
        eps: tuple[float, ...],
        identity: bool,
        projection: bool,
        relu: bool,
        kept: int,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, ...]:
        weights = [nhwc_weight(weight, x.dtype) for weight in parameters[::5]]
        norms = [tensor for i in range(0, len(parameters), 5) for tensor in parameters[i + 1 : i + 5]]
        out, *rest = residual_forward(
            x, added, weights, norms, strides, pads, eps, identity, projection, relu, kept
        )
        ys, coefs = rest[:kept], rest[kept:]
        ctx.save_for_backward(x, out if relu else None, *weights, *parameters[1::5], *coefs, *ys)
        ctx.mark_non_differentiable(*coefs)
        ctx.geometry = strides, pads
        ctx.shortcut = identity, projection
        ctx.trained = [mean is None for mean in parameters[3::5]]
        ctx.dtypes = [None if p is None else p.dtype for p in parameters]
        return out, *coefs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        n = len(ctx.trained)
        x, out, *rest = ctx.saved_tensors
        weights, gammas, coefs, ys = rest[:n], rest[n : 2 * n], rest[2 * n : 3 * n], rest[3 * n :]
        need_x, need_added, *need_parameters = (*ctx.needs_input_grad[:2], *ctx.needs_input_grad[9:])
        need_weights = need_parameters[::5]
        norm_grads, *grads = residual_backward(
            dout.contiguous(),
            out,
            x,
            ys,
            coefs,
            weights,
            gammas,
            *ctx.geometry,
            ctx.trained,
            *ctx.shortcut,
            [need_x, need_added, *need_weights],
        )
        grads.reverse()
        dx = grads.pop() if need_x else None
        dadded = grads.pop() if need_added else None
        channels = [weight.shape[0] for weight in weights for _ in range(2)]
        pairs = norm_grads.split(channels)
        parameters = []
        for i in range(n):
            weight_dtype, gamma_dtype, beta_dtype = ctx.dtypes[5 * i : 5 * i + 3]
            parameters += [
                weight_grad(grads.pop(), weight_dtype) if need_weights[i] else None,
                pairs[2 * i].to(gamma_dtype) if need_parameters[5 * i + 1] else None,
                pairs[2 * i + 1].to(beta_dtype) if need_parameters[5 * i + 2] else None,
                None,
                None,
            ]
        return dx, dadded, None, None, None, None, None, None, None, *parameters


@torch.library.custom_op("fastres::residual_forward", mutates_args=())
def residual_forward(
    x: Tensor,
    added: Tensor | None,
    weights: list[Tensor],
    norms: list[Tensor | None],
    strides: list[int],
    pads: list[int],
    eps: list[float],
    identity: bool,
    projection: bool,
    relu: bool,
    kept: int,
) -> list[Tensor]:
    """The forward schedule: the result, the first ``kept`` of (y1 ... yn, the projection's y), every layer's coef.

    Args:
        norms: gamma, beta, running mean and running variance of each layer; no running mean: batch statistics.
        pads: top, left, bottom, right of each layer.
        identity, projection: the shortcut is x, or the last layer of x; else it is ``added``, or nothing.
    """
    p = primitives(x)
    layers = len(weights) - projection

    def conv_norm(i: int, a: Tensor, below: Tensor | None) -> tuple[Tensor, Tensor]:
        gamma, beta, mean, var = norms[4 * i : 4 * i + 4]
        y, moments = p.conv(a, weights[i], strides[i], _pad(pads, i), coef=below, moments=mean is None)
        if mean is None:
            return y, p.finalize(moments, gamma, beta, eps[i])
        return y, p.running_coef(mean, var, gamma, beta, eps[i])

    y, coef = x, None
    ys, coefs = [], []
    for i in range(layers):
        y, coef = conv_norm(i, y, coef)
        coefs.append(coef)
        if i < kept:
            ys.append(y)
    shortcut, shortcut_coef = x if identity else added, None
    if projection:
        shortcut, shortcut_coef = conv_norm(layers, x, None)
        coefs.append(shortcut_coef)
        if layers < kept:
            ys.append(shortcut)
    return [p.bn_add_relu(y, coef, shortcut, shortcut_coef, relu), *ys, *coefs]


@residual_forward.register_fake
def _(x, added, weights, norms, strides, pads, eps, identity, projection, relu, kept):
    layers = len(weights) - projection
    shape, ys = x.shape, []
    for i, weight in enumerate(weights):
        before = x.shape if i == layers else shape
        hw = output_hw(before[1:3], weight.shape[1:3], strides[i], _pad(pads, i))
        y = x.new_empty(before[0], *hw, weight.shape[0])
        ys.append(y)
        shape = y.shape
    coefs = [x.new_empty(5, w.shape[0], dtype=statistics_dtype(x.dtype)) for w in weights]
    return [torch.empty_like(ys[layers - 1]), *ys[:kept], *coefs]


@torch.library.custom_op("fastres::residual_backward", mutates_args=())
def residual_backward(
    dout: Tensor,
    out: Tensor | None,
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
) -> list[Tensor]:
    """The backward schedule, see `residual_forward`; ``out`` None: the result had no ReLU.

    Args:
        ys: all convolution outputs, or all but the last layer's and the projection's.
        needs: whether x, the shortcut tensor and each weight need a gradient.

    Returns:
        The gradients of gamma and beta of every layer in one vector, then those of ``needs``.
    """
    p = primitives(x)
    layers = len(weights) - projection
    need_x, need_added, *need_weights = needs

    def y_of(i: int) -> Tensor:
        if i < len(ys):
            return ys[i]
        below, coef = (x, None) if i in (0, layers) else (ys[i - 1], coefs[i - 1])
        return p.conv(below, weights[i], strides[i], _pad(pads, i), coef=coef, moments=False)[0]

    def conv_norm_backward(
        i: int, dz: Tensor, y: Tensor, sums: Tensor, residual: Tensor | None, need_dx: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        below, coef = (x, None) if i in (0, layers) else (ys[i - 1], coefs[i - 1])
        abc, dgamma, dbeta = p.bn_backward_coef(sums, coefs[i], gammas[i], pixels(y.shape), trained[i])
        dx, sums, dws[i] = p.conv_backward(
            dz, y, abc, below, coef, weights[i], strides[i], _pad(pads, i), residual, need_dx, need_weights[i]
        )
        norm_grads[2 * i : 2 * i + 2] = dgamma, dbeta
        return dx, sums

    norm_grads, dws = [None] * (2 * len(weights)), [None] * len(weights)
    y, shortcut, shortcut_coef = y_of(layers - 1), None, None
    if projection:
        shortcut, shortcut_coef = y_of(layers), coefs[layers]
    dz, sums, shortcut_sums = p.bn_add_relu_backward(dout, out, y, coefs[layers - 1], shortcut, shortcut_coef)
    dshortcut = dz
    if projection:
        dshortcut, _ = conv_norm_backward(layers, dz, shortcut, shortcut_sums, None, need_x)
        del shortcut
    for i in reversed(range(layers)):
        residual = dshortcut if i == 0 and (identity or projection) else None
        dz, sums = conv_norm_backward(i, dz, y, sums, residual, need_x or i > 0)
        y = ys[i - 1] if i else None
    grads = [dz] * need_x + [dshortcut] * need_added + [dw for dw in dws if dw is not None]
    return [torch.cat(norm_grads), *grads]


@residual_backward.register_fake
def _(dout, out, x, ys, coefs, weights, gammas, strides, pads, trained, identity, projection, needs):
    statistics = statistics_dtype(x.dtype)
    need_x, need_added, *need_weights = needs
    dws = [torch.empty_like(w, dtype=statistics) for w, need in zip(weights, need_weights) if need]
    norm_grads = x.new_empty(2 * sum(w.shape[0] for w in weights), dtype=statistics)
    return [norm_grads] + [torch.empty_like(x)] * need_x + [torch.empty_like(dout)] * need_added + dws


def _pad(pads: Sequence[int], i: int) -> tuple[int, ...]:
    return tuple(pads[4 * i : 4 * i + 4])
