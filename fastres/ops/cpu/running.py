"""The running statistics of BatchNorms, moved in one call."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from fastres.ops.cpu.build import unavailable
from fastres.ops.cpu.native import call, integers


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
    return (
        type(tensor) is Tensor
        and tensor.dtype is torch.float32
        and tensor.is_cpu
        and tensor.is_contiguous()
        and not tensor.is_inference()
    )
