"""The vectors of a BatchNorm: what it normalises by, and the coefficients of its backward.

The statistics are the batch's, those of all ranks' batches, or the running ones. Over the ranks of a process group a
layer takes one all-reduce forward and one backward. What travels is 2C + 1 numbers forward and 2C backward, in fp64: so
sums of squares may be subtracted from one another where a mean is far above the deviations, as rounding is then still
below that of the fp32 activations, and the volume does not grow with the number of ranks. Ranks may have any number of
pixels each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastres.kernels.buffers import empty
from fastres.kernels.types import Moments
from fastres.ops.backends.protocol import MEAN, VAR, Backend

COUNT = 5  # row behind a BatchNorm's five coefficients: how many pixels all ranks had together


class Vectors(NamedTuple):
    """The vectors [C] of a BatchNorm; with running statistics it normalises by those."""

    gamma: Tensor | None
    beta: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None


def coefficients(
    p: Backend,
    y: Tensor,
    vectors: Vectors,
    eps: float,
    moments: Moments | None = None,
    known: Tensor | None = None,
    group: str | None = None,
) -> Tensor:
    """The coefficients [5, C] of a BatchNorm of y, by its running statistics or else by y's own.

    Args:
        moments: of y, where the kernel that wrote it reduced them.
        known: [5, C] that begins with y's mean and biased variance; without either they are reduced here.
        group: name of the process group whose ranks' y are normalised together: the result is [6, C], with the number
            of all ranks' pixels.
    """
    gamma, beta, running_mean, running_var = vectors
    if running_mean is not None and running_var is not None:
        return p.running_coef(running_mean, running_var, gamma, beta, eps)
    if group is not None:
        if known is None:
            known = p.finalize(p.moments(y) if moments is None else moments, None, None, 0.0)
        count = y.shape[0] * y.shape[1] * y.shape[2]
        mean, var, total = _over_ranks(p, known[MEAN], known[VAR], count, group)
        coef = p.running_coef(mean.to(known.dtype), var.to(known.dtype), gamma, beta, eps)
        return torch.cat([coef, total.to(coef.dtype).expand(1, coef.shape[1])])
    if known is not None:
        return p.running_coef(known[MEAN], known[VAR], gamma, beta, eps)
    return p.finalize(p.moments(y) if moments is None else moments, gamma, beta, eps)


def _over_ranks(p: Backend, mean: Tensor, var: Tensor, count: int, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance [C] of all ranks' pixels and their number (0-d), fp64; the host waits for nothing.

    Args:
        mean, var: [C], of this rank's ``count`` pixels, the variance biased.
        group: name of the process group; all its ranks call this in the same order.
    """
    channels = mean.shape[0]
    sums = empty(mean, 2 * channels + 1, dtype=torch.float64)
    first, second, total = sums.split([channels, channels, 1])
    first.copy_(mean)
    torch.addcmul(var.double(), first, first, out=second)
    total.fill_(1)
    p.all_reduce(sums.mul_(count), group)
    first /= total
    second /= total
    return first, second.addcmul_(first, first, value=-1).clamp_(min=0), total[0]


def backward_coefficients(
    p: Backend, sums: Tensor, coef: Tensor, count: int, training: bool, group: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`Backend.bn_backward_coef` with the sums of all ranks: A, B, C [3, C] and the gradients of gamma and beta [C].

    The gradients stay this rank's own, as those of every parameter do: the data-parallel wrapper averages them.

    Args:
        sums: [T, 2, C], this rank's.
        coef: as `coefficients` returned it.
        count: of this rank's pixels.
        training: whether the statistics are the batch's.
    """
    if group is None or not training:
        return p.bn_backward_coef(sums, coef, count, training)
    own = sums.sum(0, dtype=torch.float64)
    total = own.clone()
    p.all_reduce(total, group)
    total *= count / coef[COUNT]  # as they are divided by this rank's count next
    abc, _, _ = p.bn_backward_coef(total.to(sums.dtype)[None], coef, count, training)
    dbeta, dgamma = own.to(sums.dtype)
    return abc, dgamma, dbeta
