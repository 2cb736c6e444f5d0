"""The running statistics of BatchNorms, moved in place, all those of an operation together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastres.ops import cpu
from fastres.ops.backends.protocol import MEAN, VAR
from fastres.ops.batch_norm import COUNT
from fastres.ops.layers import Statistics, check_device
from fastres.ops.operation import is_watched


@torch.no_grad()
def update_running(
    running_means: Sequence[Tensor],
    running_vars: Sequence[Tensor],
    statistics: Sequence[Statistics],
    momenta: Sequence[float | Tensor],
) -> None:
    """In place: move each running mean, and unbiased variance, towards the batch's by its momentum.

    On a GPU as many launches as for one BatchNorm, on a CPU one call, where the momenta are equal numbers.

    Args:
        running_means, running_vars: [C] of each BatchNorm.
        statistics: of each, as its operation returned them.
        momenta: of each a number, or a 0-d tensor on their device, so that nothing waits for it.

    Raises:
        RuntimeError: as `torch.nn.functional.batch_norm` raises it.
        ValueError: for sequences of different lengths.
    """
    for mean, var, (coef, _) in zip(running_means, running_vars, statistics, strict=True):
        for name, tensor in (("running_mean", mean), ("running_var", var)):
            if tensor.numel() != coef.shape[1]:
                raise RuntimeError(f"{name} should contain {coef.shape[1]} elements not {tensor.numel()}")
            check_device(tensor, name, coef.device)
    if not all(count for _, count in statistics):  # an empty batch moves nothing
        filled = [place for place, (_, count) in enumerate(statistics) if count]
        running_means, running_vars = [running_means[i] for i in filled], [running_vars[i] for i in filled]
        statistics, momenta = [statistics[i] for i in filled], [momenta[i] for i in filled]
    if not statistics:
        return
    factors = [_correction(one) for one in statistics]
    numbers = [factor for factor in factors if not isinstance(factor, Tensor)]
    first = momenta[0]
    momentum = None if isinstance(first, Tensor) or len(set(momenta)) > 1 else first  # where it is one number
    if momentum is not None and len(numbers) == len(factors) and not is_watched():
        coefs = [coef for coef, _ in statistics]
        if cpu.update_running(running_means, running_vars, coefs, numbers, momentum):
            return
    biased = [coef[VAR] for coef, _ in statistics]
    if len(numbers) == len(factors):
        unbiased = list(torch._foreach_mul(biased, numbers))
    else:
        unbiased = [var * factor for var, factor in zip(biased, factors, strict=True)]
    running = [*running_means, *running_vars]
    batch = [
        value.to(tensor.dtype).view_as(tensor)
        for tensor, value in zip(running, [*(coef[MEAN] for coef, _ in statistics), *unbiased], strict=True)
    ]
    if momentum is not None:
        torch._foreach_lerp_(running, batch, momentum)
        return
    for tensor, value, weight in zip(running, batch, [*momenta, *momenta], strict=True):
        tensor.lerp_(value, weight)


def _correction(statistics: Statistics) -> float | Tensor:
    """From the biased to the unbiased variance; synchronised statistics' number of pixels only the device knows."""
    coef, count = statistics
    if coef.shape[0] > COUNT:
        return coef[COUNT] / (coef[COUNT] - 1)
    return count / (count - 1)
