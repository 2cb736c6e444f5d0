"""BatchNorm and ReLU of a tensor that no convolution made just now: the head of the pre-activation networks."""

from typing import Any

import torch
from torch import Tensor

from fastres.ops import again, plain
from fastres.ops.aten import statistics_dtype
from fastres.ops.coefficients import backward_coefficients, coefficients, rows
from fastres.ops.layers import (
    Norm,
    Statistics,
    check_activations,
    check_coef,
    check_norm,
    contiguous,
    dense,
    group_of,
    in_autocast,
    norm_vectors,
    pixels,
)
from fastres.ops.operation import operation
from fastres.ops.select import primitives


def bn_relu(x: Tensor, norm: Norm, coef: Tensor | None = None) -> tuple[Tensor, Statistics]:
    """``relu(bn(x))`` of x [N, H, W, C], differentiable, with the BatchNorm's `Statistics`.

    Args:
        coef: [5, C] that begins with x's mean and biased variance, this rank's own; None: they are reduced from x
            where needed.

    Raises:
        RuntimeError, ValueError: as `torch.nn.functional.batch_norm` raises them.
    """
    check_activations(x)
    check_norm(norm, tuple(x.shape), x.device)
    if coef is not None:
        check_coef(coef, x.shape[3], x.device)
        coef = coef.contiguous()
    x = in_autocast(x).contiguous()
    if plain.is_needed(x):
        return plain.bn_relu(x, norm)
    out, used = _BNReLU.apply(x, coef, norm.eps, group_of([norm]), *norm_vectors(norm))
    return out, Statistics(used, pixels(x.shape))


class _BNReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        coef: Tensor | None,
        eps: float,
        group: str | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        out, used = bn_relu_forward(x, coef, gamma, beta, running_mean, running_var, eps, group)
        ctx.save_for_backward(x, out, used, gamma)
        ctx.mark_non_differentiable(used)
        ctx.trained, ctx.group = running_mean is None, group
        ctx.dtypes = None if gamma is None else gamma.dtype, None if beta is None else beta.dtype
        ctx.given, ctx.eps = again.given([gamma, beta, running_mean, running_var]), eps
        return out, used

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        dout = dense(dout)
        saved = contiguous(ctx.saved_tensors)
        if again.is_differentiated(dout):
            needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[4:]]
            dx, *parameters = again.bn_relu(ctx.given, saved[0], dout, needs, ctx.eps, ctx.group)
            return dx, None, None, None, *parameters
        dx, norm_grads = bn_relu_backward(dout, *saved, ctx.trained, ctx.group)
        dgamma, dbeta = norm_grads.chunk(2)
        need_gamma, need_beta = ctx.needs_input_grad[4:6]
        return (
            dx,
            None,
            None,
            None,
            dgamma.to(ctx.dtypes[0]) if need_gamma else None,
            dbeta.to(ctx.dtypes[1]) if need_beta else None,
            None,
            None,
        )


@operation("bn_relu_forward")
def bn_relu_forward(
    x: Tensor,
    coef: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    group: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The result and the coefficients it was normalised by."""
    p = primitives(x)
    coef = coefficients(p, x, gamma, beta, running_mean, running_var, eps, known=coef, group=group)
    return p.bn_add_relu(x, coef), coef


@bn_relu_forward.register_fake
def _(x, coef, gamma, beta, running_mean, running_var, eps, group=None):
    return torch.empty_like(x), x.new_empty(rows(running_mean, group), x.shape[3], dtype=statistics_dtype(x.dtype))


@operation("bn_relu_backward")
def bn_relu_backward(
    dout: Tensor, x: Tensor, out: Tensor, coef: Tensor, gamma: Tensor | None, trained: bool, group: str | None = None
) -> tuple[Tensor, Tensor]:
    """Gradient of x, and those of gamma and beta in one vector."""
    p = primitives(x)
    dz, sums, _ = p.bn_add_relu_backward(dout, out, x, coef)
    abc, dgamma, dbeta = backward_coefficients(p, sums, coef, gamma, pixels(x.shape), trained, group)
    return p.bn_backward_apply(dz, x if trained else None, abc), torch.cat([dgamma, dbeta])


@bn_relu_backward.register_fake
def _(dout, x, out, coef, gamma, trained, group=None):
    return torch.empty_like(x), x.new_empty(2 * x.shape[3], dtype=statistics_dtype(x.dtype))
