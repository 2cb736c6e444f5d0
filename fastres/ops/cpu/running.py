"""The running statistics of BatchNorms, moved in one call."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from fastres.ops.cpu.build import unavailable
from fastres.ops.cpu.native import call, integers, is_float32


def update(
    running_means: Sequence[Tensor],
    running_vars: Sequence[Tensor],
    coefs: Sequence[Tensor],
    corrections: Sequence[float],
    momentum: float,
) -> bool:
    """In place, see `fastres.ops.running.update_running`; False: nothing was done, as these are no such tensors here.

    Args:
        running_means, running_vars: [C] of each BatchNorm.
        coefs: [5, C] that begins with the batch's mean and biased variance.
        corrections: what makes that the unbiased variance.
    """
    running = [*running_means, *running_vars]
    if not all(map(_is_plain, running)) or not all(map(_is_plain, coefs)) or unavailable():
        return False
    table: list[int] = []
    for mean, var, coef, correction in zip(running_means, running_vars, coefs, corrections, strict=True):
        bits = struct.unpack("q", struct.pack("d", correction))[0]
        table += (mean.data_ptr(), var.data_ptr(), coef.data_ptr(), mean.numel(), bits)
    call("update_running", integers(table), len(running_means), momentum)
    torch.autograd.graph.increment_version(running)  # as PyTorch's own operations in place do
    return True


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and is_float32(tensor) and tensor.is_contiguous()
