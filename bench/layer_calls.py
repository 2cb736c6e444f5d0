"""The operations that a training step of an identity bottleneck is made of, each by every implementation there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastres.ops import cpu
from fastres.ops.backends.aten import Aten
from fastres.ops.backends.cpp import Cpp
from fastres.ops.backends.protocol import Activation, Backend, Convolution, Gradient, Normalised, Shortcut
from fastres.ops.backends.triton import Triton, Vendor


@dataclass(frozen=True)
class Call:
    """An operation on given tensors."""

    name: str
    candidates: dict[str, Callable[[], Any]]
    flops: int  # of its products
    bytes: int  # of its arguments and results, each once


def implementations(device: torch.device) -> dict[str, Backend]:
    """Backends by name: on a CPU ATen's, and the compiled passes where they can be had."""
    found: list[Backend] = []
    if device.type == "cpu" and not cpu.unavailable():
        found = [Cpp()]
    if device.type == "cuda":
        found = [Triton(), Vendor()]
    return {backend.name: backend for backend in [*found, Aten()]}


def bottleneck_calls(batch: int, size: int, width: int, device: torch.device, dtype: torch.dtype) -> Iterator[Call]:
    """Forward and backward operations, in order, on random tensors; bare library convolutions stand beside them.

    Args:
        size, width: height and width of the images; channels of the 3x3 convolution.
    """
    wide = 4 * width

    def tensor(*shape: int, like: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, device=device).to(like)

    def coefficients(channels: int) -> Tensor:
        return torch.rand(5, channels, device=device) + 0.5

    layers = [("1x1 in", wide, width, 1), ("3x3", width, width, 3), ("1x1 out", width, wide, 1)]
    for index, (name, inputs, outputs, kernel) in enumerate(layers):
        x = tensor(batch, size, size, inputs)
        w = tensor(outputs, kernel, kernel, inputs) / (kernel * inputs**0.5)
        dz, y = tensor(batch, size, size, outputs), tensor(batch, size, size, outputs)
        abc, below = torch.rand(3, outputs, device=device), None if index == 0 else coefficients(inputs)
        activation, conv = Activation(x, below), Convolution(w, 1, (kernel // 2,) * 4)
        gradient, joined = Gradient(dz, y, abc), Shortcut(x.clone()) if index == 0 else None
        flops = 2 * y.numel() * inputs * kernel * kernel
        nchw = [t.permute(0, 3, 1, 2) for t in (x, w, dz)]
        bare: Callable[[], Any] = partial(F.conv2d, nchw[0], nchw[1], None, 1, kernel // 2)
        yield _call(f"conv {name}", device, "conv", (activation, conv), flops, bare)
        bare = partial(bare_backward, nchw[2], nchw[0], nchw[1], (1, 1), (kernel // 2,) * 2)
        arguments = (gradient, activation, conv, joined)
        yield _call(f"conv_backward {name}", device, "conv_backward", arguments, 2 * flops, bare)
        bare = partial(bare_backward, nchw[2], nchw[0], nchw[1], (1, 1), (kernel // 2,) * 2, need_dx=False)
        of_weight = (gradient, activation, conv)
        yield _call(f"conv_wgrad {name}", device, "conv_wgrad", of_weight, flops, bare)
    y, shortcut, dout = (tensor(batch, size, size, wide) for _ in range(3))
    end = Normalised(y, coefficients(wide))
    yield _call("bn_add_relu", device, "bn_add_relu", (end, Shortcut(shortcut)))
    yield _call("bn_add_relu_backward", device, "bn_add_relu_backward", (dout, shortcut, end))
    yield _call("moments", device, "moments", (y,))


def _call(
    name: str,
    device: torch.device,
    op: str,
    arguments: tuple,
    flops: int = 0,
    bare: Callable[[], Any] | None = None,
) -> Call:
    candidates: dict[str, Callable[[], Any]] = {
        which: partial(getattr(space, op), *arguments) for which, space in implementations(device).items()
    }
    result = next(iter(candidates.values()))()
    if bare is not None:
        candidates["bare convolution"] = bare
    moved = sum(t.nbytes for t in tree_leaves((arguments, result)) if isinstance(t, Tensor))
    return Call(name, candidates, flops, moved)


def bare_backward(
    dy: Tensor, x: Tensor, w: Tensor, stride: Sequence[int], padding: Sequence[int], need_dx: bool = True
) -> tuple[Tensor | None, Tensor]:
    """The library's gradients of a convolution, NCHW: at x, if needed, and of w."""
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dy, x, w, None, list(stride), list(padding), [1, 1], False, [0, 0], 1, [need_dx, True, False]
    )
    return dx, dw
