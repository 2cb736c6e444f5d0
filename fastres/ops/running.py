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


class Running:
    """The running statistics of an operation's BatchNorms, to be moved step by step.

    Args:
        means, variances: [C] of each BatchNorm.
        counts: pixels that each takes the batch's over, this rank's.
        counters: int64 of one element of BatchNorms, in any order, that count the moves.

    Raises:
        ValueError: for sequences of different lengths.
    """

    def __init__(
        self,
        means: Sequence[Tensor],
        variances: Sequence[Tensor],
        counts: Sequence[int],
        counters: Sequence[Tensor] = (),
    ):
        filled = [place for place, (_, _, count) in enumerate(zip(means, variances, counts, strict=True)) if count]
        self._filled = filled  # an empty batch moves nothing
        self._every = len(filled) == len(counts)
        self._means, self._variances = [means[i] for i in filled], [variances[i] for i in filled]
        self._unbiased = [counts[i] / max(counts[i] - 1, 1) for i in filled]  # of one pixel: there are other ranks'
        self._counters = list(counters)
        self._on_cpu = cpu.Running(self._means, self._variances, self._unbiased, self._counters)
        self._checked: list[tuple[torch.Size, torch.device]] = []

    def move(self, coefs: Sequence[Tensor], momenta: Sequence[float | Tensor]) -> None:
        """In place: count, and move each running mean, and unbiased variance, towards the batch's by its momentum.

        On a GPU as many launches as for one BatchNorm, on a CPU one call, where the momenta are equal numbers.

        Args:
            coefs: [5, C] of each that begins with the batch's mean and biased variance; synchronised ones have the
                number of pixels in a sixth row.
            momenta: of each a number, or a 0-d tensor on their device, so that nothing waits for it.

        Raises:
            RuntimeError: as `torch.nn.functional.batch_norm` raises it.
        """
        if not self._every:
            coefs, momenta = [coefs[i] for i in self._filled], [momenta[i] for i in self._filled]
        self._check(coefs)
        momentum = _in_common(momenta)
        apart = any(coef.shape[0] > COUNT for coef in coefs)  # synchronised
        if momentum is not None and not apart and not is_watched():
            if self._on_cpu.move(coefs, momentum):
                return
        if self._counters:
            torch._foreach_add_(self._counters, 1)
        if coefs:
            self._move(coefs, momenta, momentum, apart)

    def _move(
        self, coefs: Sequence[Tensor], momenta: Sequence[float | Tensor], momentum: float | None, apart: bool
    ) -> None:
        biased = [coef[VAR] for coef in coefs]
        if apart:
            factors = [_correction(coef, number) for coef, number in zip(coefs, self._unbiased)]
            unbiased = [var * factor for var, factor in zip(biased, factors, strict=True)]
        else:
            unbiased = list(torch._foreach_mul(biased, self._unbiased))
        running = [*self._means, *self._variances]
        batch = [
            value
            if value.dtype == tensor.dtype and value.shape == tensor.shape
            else value.to(tensor.dtype).view_as(tensor)
            for tensor, value in zip(running, [*(coef[MEAN] for coef in coefs), *unbiased], strict=True)
        ]
        if momentum is not None:
            torch._foreach_lerp_(running, batch, momentum)
            return
        for tensor, value, weight in zip(running, batch, [*momenta, *momenta], strict=True):
            tensor.lerp_(value, weight)

    def _check(self, coefs: Sequence[Tensor]) -> None:
        """Once for coefficients of the same sizes."""
        forms = [(coef.shape, coef.device) for coef in coefs]
        if forms == self._checked:
            return
        for mean, var, coef in zip(self._means, self._variances, coefs, strict=True):
            for name, tensor in (("running_mean", mean), ("running_var", var)):
                if tensor.numel() != coef.shape[1]:
                    raise RuntimeError(f"{name} should contain {coef.shape[1]} elements not {tensor.numel()}")
                check_device(tensor, name, coef.device)
        self._checked = forms


@torch.no_grad()
def update_running(
    running_means: Sequence[Tensor],
    running_vars: Sequence[Tensor],
    statistics: Sequence[Statistics],
    momenta: Sequence[float | Tensor],
) -> None:
    """In place: move each running mean, and unbiased variance, towards the batch's by its momentum.

    Args:
        running_means, running_vars: [C] of each BatchNorm.
        statistics: of each, as its operation returned them.
        momenta: see `Running.move`.

    Raises:
        RuntimeError: as `torch.nn.functional.batch_norm` raises it.
        ValueError: for sequences of different lengths.
    """
    running = Running(running_means, running_vars, [count for _, count in statistics])
    running.move([coef for coef, _ in statistics], momenta)


def _in_common(momenta: Sequence[float | Tensor]) -> float | None:
    """The number that all are, 0 where there are none."""
    first = momenta[0] if momenta else 0.0
    return None if isinstance(first, Tensor) or len(set(momenta)) > 1 else first


def _correction(coef: Tensor, number: float) -> float | Tensor:
    """From the biased to the unbiased variance; synchronised statistics' number of pixels only the device knows."""
    return coef[COUNT] / (coef[COUNT] - 1) if coef.shape[0] > COUNT else number
