"""What a BatchNorm normalises by: the batch's statistics, those of all ranks' batches, or the running ones."""

from __future__ import annotations

import torch
from torch import Tensor

from fastres.kernels.types import Moments
from fastres.ops.aten import MEAN, VAR
from fastres.ops.layers import pixels
from fastres.ops.select import Primitives
from fastres.ops.synchronise import COUNT, all_reduce, merge


def coefficients(
    p: Primitives,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    moments: Moments | None = None,
    known: Tensor | None = None,
    group: str | None = None,
) -> Tensor:
    """Coefficients [5, C] of a BatchNorm of x, by its running statistics or else by x's own.

    Args:
        moments: of x, where the kernel that wrote it reduced them.
        known: [5, C] that begins with x's mean and biased variance; without either they are reduced here.
        group: name of the process group whose ranks' x are normalised together, see `rows`.
    """
    if running_mean is not None:
        return p.running_coef(running_mean, running_var, gamma, beta, eps)
    if group is not None:
        if known is None:
            known = p.finalize(p.moments(x) if moments is None else moments, None, None, 0.0)
        mean, var, total = merge(known[MEAN], known[VAR], pixels(x.shape), group)
        coef = p.running_coef(mean.to(known.dtype), var.to(known.dtype), gamma, beta, eps)
        return torch.cat([coef, total.to(coef.dtype).expand(1, coef.shape[1])])
    if known is not None:
        return p.running_coef(known[MEAN], known[VAR], gamma, beta, eps)
    return p.finalize(p.moments(x) if moments is None else moments, gamma, beta, eps)


def rows(running_mean: Tensor | None, group: str | None) -> int:
    """Rows of `coefficients`: five, and one of all ranks' count of pixels where those normalise together."""
    return COUNT + (running_mean is None and group is not None)


def backward_coefficients(
    p: Primitives,
    sums: Tensor,
    coef: Tensor,
    gamma: Tensor | None,
    count: int,
    trained: bool,
    group: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`bn_backward_coef` with the sums of all ranks of the group: A, B, C [3, C] and gradients of gamma and beta [C].

    The gradients stay this rank's own, as those of every parameter do: to average them is the data-parallel wrapper's.
    A layer that is not ``trained`` has B = C = 0. What takes its A, B, C is given no y: it is not read, and 0 times a y
    that is not finite is not NaN.

    Args:
        sums: [T, 2, C], this rank's.
        coef: as `coefficients` returned it.
        count: of this rank's pixels.
    """
    if group is None or not trained:
        return p.bn_backward_coef(sums, coef, gamma, count, trained)
    own = sums.sum(0, dtype=torch.float64)
    total = own.clone()
    all_reduce(total, group)
    total *= count / coef[COUNT]  # as they are divided by this rank's count next
    abc, _, _ = p.bn_backward_coef(total.to(sums.dtype)[None], coef, gamma, count, trained)
    dbeta, dgamma = own.to(sums.dtype)
    return abc, dgamma, dbeta
