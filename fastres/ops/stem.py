"""The stem as one operation: convolution, BatchNorm, ReLU and max-pool.

The normalised, rectified image in front of the pool, the largest activation of a ResNet, never exists: the pool reads
the convolution's output. For backward the image, that output and a byte an output (the winning tap) are kept.
"""

from typing import Any

import torch
from torch import Tensor

from fastres.ops import again, plain
from fastres.ops.aten import statistics_dtype
from fastres.ops.coefficients import backward_coefficients, coefficients, rows
from fastres.ops.layers import (
    Layer,
    Pad,
    Statistics,
    check_input,
    contiguous,
    dense,
    group_of,
    in_autocast,
    layer_shape,
    nhwc_weight,
    norm_vectors,
    output_hw,
    pixels,
    weight_grad,
)
from fastres.ops.operation import operation
from fastres.ops.select import primitives


def stem(x: Tensor, layer: Layer, kernel: int, stride: int, pad: Pad) -> tuple[Tensor, Statistics]:
    """``max_pool(relu(bn(conv(x))))``, differentiable, with the BatchNorm's `Statistics`.

    Args:
        x: [N, H, W, C].
        kernel, stride, pad: of the pool; padded pixels never win.

    Raises:
        RuntimeError, ValueError: as `torch.nn.functional.conv2d`, `batch_norm` and `max_pool2d` raise them.
    """
    check_input(x, [layer.weight])
    shape = layer_shape(tuple(x.shape), layer)
    if stride < 1:
        raise RuntimeError("stride should not be zero")
    if min(pad) < 0 or 2 * max(pad) > kernel:
        raise RuntimeError(
            f"pad should be at most half of effective kernel size, but got pad={pad}, kernel_size={kernel}"
        )
    if min(output_hw(shape[1:3], (kernel, kernel), stride, pad)) < 1:
        raise RuntimeError(f"Given input size: ({shape[3]}x{shape[1]}x{shape[2]}). Output size is too small")
    x = in_autocast(x).contiguous()
    if plain.is_needed(x):
        return plain.stem(x, layer, kernel, stride, pad)
    out, coef = _Stem.apply(
        x,
        layer.stride,
        layer.pad,
        layer.norm.eps,
        kernel,
        stride,
        pad,
        group_of([layer.norm]),
        layer.dilation,
        layer.weight,
        *norm_vectors(layer.norm),
    )
    return out, Statistics(coef, pixels(shape))


class _Stem(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        stride: int,
        pad: Pad,
        eps: float,
        pool_kernel: int,
        pool_stride: int,
        pool_pad: Pad,
        group: str | None,
        dilation: int,
        weight: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        w = nhwc_weight(weight, x.dtype)
        vectors, pool = (gamma, beta, running_mean, running_var), (pool_kernel, pool_stride, pool_pad)
        out, index, y, coef = stem_forward(x, w, *vectors, stride, pad, eps, *pool, group, dilation)
        ctx.save_for_backward(index, x, y, coef, w, gamma)
        ctx.mark_non_differentiable(coef)
        ctx.geometry = stride, pad, *pool
        ctx.trained, ctx.group, ctx.dilation = running_mean is None, group, dilation
        ctx.dtypes = [None if p is None else p.dtype for p in (weight, gamma, beta)]
        ctx.given, ctx.eps = again.given([weight, gamma, beta, running_mean, running_var]), eps
        return out, coef

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        dout = dense(dout)
        need_x, need_weight, need_gamma, need_beta = ctx.needs_input_grad[0], *ctx.needs_input_grad[9:12]
        saved = contiguous(ctx.saved_tensors)
        if again.is_differentiated(dout):
            stride, pad, pool_kernel, pool_stride, pool_pad = ctx.geometry
            pool = dict(pool_kernel=pool_kernel, pool_stride=pool_stride, pool_pad=pool_pad)
            needs = [need_x, *ctx.needs_input_grad[9:]]
            geometry = dict(stride=stride, pad=pad, dilation=ctx.dilation, eps=ctx.eps)
            dx, *parameters = again.stem(ctx.given, saved[1], dout, needs, ctx.group, **geometry, **pool)
            return dx, *[None] * 8, *parameters
        kinds = ctx.trained, need_x, need_weight, ctx.group, ctx.dilation
        norm_grads, *grads = stem_backward(dout, *saved, *ctx.geometry, *kinds)
        dgamma, dbeta = norm_grads.chunk(2)
        dtypes = ctx.dtypes
        return (
            grads[0] if need_x else None,
            *[None] * 8,
            weight_grad(grads[-1], dtypes[0]) if need_weight else None,
            dgamma.to(dtypes[1]) if need_gamma else None,
            dbeta.to(dtypes[2]) if need_beta else None,
            None,
            None,
        )


@operation("stem_forward")
def stem_forward(
    x: Tensor,
    w: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    stride: int,
    pad: list[int],
    eps: float,
    pool_kernel: int,
    pool_stride: int,
    pool_pad: list[int],
    group: str | None = None,
    dilation: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result, each one's winning tap (uint8), the convolution's output and the BatchNorm's coef."""
    p = primitives(x)
    y, moments = p.conv(x, w, stride, tuple(pad), moments=running_mean is None, dilation=dilation)
    coef = coefficients(p, y, gamma, beta, running_mean, running_var, eps, moments, group=group)
    return *p.bn_relu_max_pool(y, coef, pool_kernel, pool_stride, tuple(pool_pad)), y, coef


@stem_forward.register_fake
def _(
    x,
    w,
    gamma,
    beta,
    running_mean,
    running_var,
    stride,
    pad,
    eps,
    pool_kernel,
    pool_stride,
    pool_pad,
    group=None,
    dilation=1,
):
    n, channels = x.shape[0], w.shape[0]
    hw = output_hw(x.shape[1:3], w.shape[1:3], stride, pad, dilation)
    out = x.new_empty(n, *output_hw(hw, (pool_kernel, pool_kernel), pool_stride, pool_pad), channels)
    coef = x.new_empty(rows(running_mean, group), channels, dtype=statistics_dtype(x.dtype))
    return out, torch.empty_like(out, dtype=torch.uint8), x.new_empty(n, *hw, channels), coef


@operation("stem_backward")
def stem_backward(
    dout: Tensor,
    index: Tensor,
    x: Tensor,
    y: Tensor,
    coef: Tensor,
    w: Tensor,
    gamma: Tensor | None,
    stride: int,
    pad: list[int],
    pool_kernel: int,
    pool_stride: int,
    pool_pad: list[int],
    trained: bool,
    need_x: bool,
    need_weight: bool,
    group: str | None = None,
    dilation: int = 1,
) -> list[Tensor]:
    """The gradients of gamma and beta in one vector, then those of x and the weight where needed."""
    p = primitives(x)
    dz, sums = p.bn_relu_max_pool_backward(dout, index, y, coef, pool_kernel, pool_stride, tuple(pool_pad))
    abc, dgamma, dbeta = backward_coefficients(p, sums, coef, gamma, pixels(y.shape), trained, group)
    needs = dict(need_dx=need_x, need_dw=need_weight)
    y = y if trained else None
    dx, _, dw = p.conv_backward(dz, y, abc, x, None, w, stride, tuple(pad), **needs, dilation=dilation)
    return [torch.cat([dgamma, dbeta]), *(grad for grad in (dx, dw) if grad is not None)]


@stem_backward.register_fake
def _(
    dout,
    index,
    x,
    y,
    coef,
    w,
    gamma,
    stride,
    pad,
    pool_kernel,
    pool_stride,
    pool_pad,
    trained,
    need_x,
    need_weight,
    group=None,
    dilation=1,
):
    statistics = statistics_dtype(x.dtype)
    grads = [torch.empty_like(x)] * need_x + [torch.empty_like(w, dtype=statistics)] * need_weight
    return [x.new_empty(2 * w.shape[0], dtype=statistics), *grads]
