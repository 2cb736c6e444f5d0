"""What a BatchNorm normalises by: the batch's statistics or the running ones."""

from __future__ import annotations

from torch import Tensor

from fastres.kernels.types import Moments
from fastres.ops.aten import MEAN, VAR
from fastres.ops.select import Primitives


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
) -> Tensor:
    """Coefficients [5, C] of a BatchNorm of x, by its running statistics or else by x's own.

    Args:
        moments: of x, where the kernel that wrote it reduced them.
        known: [5, C] that begins with x's mean and biased variance; without either they are reduced here.
    """
    if running_mean is None and known is not None:
        running_mean, running_var = known[MEAN], known[VAR]
    if running_mean is not None:
        return p.running_coef(running_mean, running_var, gamma, beta, eps)
    return p.finalize(p.moments(x) if moments is None else moments, gamma, beta, eps)
