"""Bytes of activations that a training step keeps from forward to backward, beside its input."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def saved_bytes(module: nn.Module, x: Tensor, dtype: torch.dtype) -> int:
    """Bytes of the distinct storages of N images' activations that autograd holds after a forward under autocast.

    The input is left out: it is the result of the block before, which counts it. So are weights and vectors.
    """
    held: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.dim() == 4 and not isinstance(tensor, nn.Parameter) and x.shape[0] == tensor.shape[0]:
            held[tensor.untyped_storage()._cdata] = tensor  # held, so that no storage comes twice
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
    ):
        out = module(x)
    held.pop(x.untyped_storage()._cdata, None)
    assert out.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())
