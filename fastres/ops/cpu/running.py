"""The running statistics of BatchNorms, moved in one call."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from fastres.ops.cpu.build import unavailable
from fastres.ops.cpu.native import call, integers, is_float32


class Running:
    """See `fastres.ops.running.Running`, for fp32 tensors without gaps on the CPU.

    Args:
        means, variances: [C] of each BatchNorm.
        corrections: what makes the biased variance of each the unbiased one.
        counters: int64.
    """

    def __init__(
        self,
        means: Sequence[Tensor],
        variances: Sequence[Tensor],
        corrections: Sequence[float],
        counters: Sequence[Tensor] = (),
    ):
        self._means, self._variances, self._counters = list(means), list(variances), list(counters)
        self._corrections = list(corrections)
        self._moved = [*means, *variances, *counters]
        self._takes: bool | None = None  # until it is asked

    def move(self, coefs: Sequence[Tensor], momentum: float) -> bool:
        """In place; False: nothing was done, as these are no such tensors here.

        Args:
            coefs: [5, C] that begins with the batch's mean and biased variance.
        """
        if self._takes is None:
            plain = all(map(_is_plain, [*self._means, *self._variances]))
            self._takes = plain and all(map(_is_counter, self._counters)) and not unavailable()
            self._bits = struct.unpack(f"{len(self._means)}q", struct.pack(f"{len(self._means)}d", *self._corrections))
        if not self._takes or not all(map(_is_plain, coefs)):
            return False
        table: list[int] = []
        for mean, var, coef, bits in zip(self._means, self._variances, coefs, self._bits, strict=True):
            table += (mean.data_ptr(), var.data_ptr(), coef.data_ptr(), mean.numel(), bits)
        counters = integers([counter.data_ptr() for counter in self._counters])
        call("update_running", integers(table), len(self._means), counters, len(counters), momentum)
        torch.autograd.graph.increment_version(self._moved)  # as PyTorch's own operations in place do
        return True


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and is_float32(tensor) and tensor.is_contiguous()


def _is_counter(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and tensor.dtype is torch.int64 and tensor.is_cpu and not tensor.is_inference()
