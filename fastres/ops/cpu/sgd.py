"""A step of SGD with momentum over all parameters in one call and one pass over their memory.

PyTorch's fused step copies each gradient in channels-last memory first, and a decoupled weight decay is a pass more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastres.ops.cpu.build import unavailable
from fastres.ops.cpu.native import call, integers, is_float32

_FORMATS = (torch.contiguous_format, torch.channels_last)


class Rates(NamedTuple):
    """Of a step: ``decay`` shrinks weights by ``1 - lr * decay``; to gradients ``coupled * weight`` is added."""

    lr: float
    momentum: float
    nesterov: bool
    decay: float
    coupled: float


def takes(parameters: Sequence[Tensor], gradients: Sequence[Tensor], buffers: Sequence[Tensor | None]) -> bool:
    """Whether `step` takes these: fp32 on the CPU without gaps, those of one parameter in the same memory format."""
    for parameter, gradient, buffer in zip(parameters, gradients, buffers, strict=True):
        if not (_is_plain(parameter) and _is_plain(gradient) and (buffer is None or _is_plain(buffer))):
            return False
        form = parameter.shape, parameter.stride()
        alike = (gradient.shape, gradient.stride()) == form and (
            buffer is None or (buffer.shape, buffer.stride()) == form
        )
        there = (parameter,) if alike else (parameter, gradient) if buffer is None else (parameter, gradient, buffer)
        if not in_one_format(there):
            return False
    return not unavailable()


def step(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], buffers: Sequence[Tensor | None], rates: Rates
) -> list[Tensor | None]:
    """``weight = weight * (1 - lr * decay) - lr * move``, in place, of tensors that `takes` takes.

    Args:
        buffers: of the momentum, moved in place; None: not there yet.

    Returns:
        The buffers; None each without momentum.
    """
    table: list[int] = []
    made = [_buffer(parameter, buffer, rates) for parameter, buffer in zip(parameters, buffers)]
    for parameter, gradient, before, buffer in zip(parameters, gradients, buffers, made):
        address = 0 if buffer is None else buffer.data_ptr()
        table += (parameter.data_ptr(), gradient.data_ptr(), address, parameter.numel(), before is None)
    kept = 1 - rates.lr * rates.decay
    threads = torch.get_num_threads()
    call("sgd", integers(table), len(made), rates.lr, rates.momentum, rates.nesterov, kept, rates.coupled, threads)
    changed = [*parameters, *(buffer for buffer in made if buffer is not None)]
    torch.autograd.graph.increment_version(changed)  # as PyTorch's own operations in place do
    return made


def _buffer(parameter: Tensor, buffer: Tensor | None, rates: Rates) -> Tensor | None:
    if not rates.momentum:
        return None
    return torch.empty_like(parameter.detach()) if buffer is None else buffer


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and is_float32(tensor)


def in_one_format(tensors: Sequence[Tensor]) -> bool:
    """Whether the same places in the memory of these are the same elements, without gaps."""
    first, *others = tensors
    if not others:
        return first.is_contiguous() or (first.dim() == 4 and first.is_contiguous(memory_format=torch.channels_last))
    formats = _FORMATS if first.dim() == 4 else _FORMATS[:1]
    return all(tensor.shape == first.shape for tensor in others) and any(
        all(tensor.is_contiguous(memory_format=form) for tensor in tensors) for form in formats
    )
