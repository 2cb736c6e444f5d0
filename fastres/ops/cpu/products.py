"""Convolutions of one part of a batch: as a matrix product where they are one, else PyTorch's own.

A 1x1 convolution's product in bf16 needs no reordered copy of weights and activations, and leaves its result where it
belongs; in fp32 PyTorch's products go to another library, which is not faster than its convolutions. The weight
gradient of a strided convolution is faster as one product with all windows' inputs, which are normalised as they are
gathered.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastres.kernels.geometry import Pad, is_pointwise
from fastres.ops.backends.protocol import Activation, Convolution
from fastres.ops.backends.vendor import convolve, convolve_backward
from fastres.ops.cpu import passes

# Gathering the windows costs about 23/Cout of the product (at 10 GB/s and 230 GFLOP/s a core).
_GATHER_CHANNELS = 256


def forward(a: Tensor, conv: Convolution, y: Tensor | None) -> Tensor:
    """The convolution of a: in y where it can be, else in a tensor of its own."""
    w = conv.weight
    if not _is_product(w, conv.pad):
        return convolve(a, conv)
    a = _strided(a, conv.stride)
    y = a.new_empty(*a.shape[:3], w.shape[0]) if y is None else y
    torch.mm(_matrix(a), _matrix(w).t(), out=_matrix(y))
    return y


def backward(
    dy: Tensor, activation: Activation, conv: Convolution, dx: Tensor | None, need_dx: bool, need_dw: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a convolution.

    Returns:
        That at its input, in dx where it can be, else in a tensor of its own; that of the weight in fp32.
    """
    (x, coef, act), (w, stride, pad, dilation) = activation, conv
    product = _is_product(w, pad)
    if product:
        if need_dx:
            dx = dy.new_empty(x.shape) if dx is None else dx
            _product_data_grad(dy, w, stride, dx)
        if not need_dw:
            return dx, None
        a = _strided(x, stride)
        a = _matrix(a if coef is None else passes.bn_add_relu(a, coef, act=act))
    elif need_dw and dilation == 1 and _is_gathered(w, stride):
        if need_dx:
            dx, _ = convolve_backward(dy, x, conv, True, False)
        a = passes.patches(x, coef, dy, w.shape[1], stride, pad, act)
    else:
        a = x if coef is None or not need_dw else passes.bn_add_relu(x, coef, act=act)
        return convolve_backward(dy, a, conv, need_dx, need_dw)
    return dx, torch.mm(_matrix(dy).t(), a).float().view(w.shape)


def _product_data_grad(dy: Tensor, w: Tensor, stride: int, dx: Tensor) -> None:
    if stride == 1:
        torch.mm(_matrix(dy), _matrix(w), out=_matrix(dx))
    else:
        dx.zero_()[:, ::stride, ::stride] = torch.mm(_matrix(dy), _matrix(w)).view(*dy.shape[:3], -1)


def _is_product(w: Tensor, pad: Pad) -> bool:
    return w.dtype == torch.bfloat16 and is_pointwise(w.shape[1:3], pad)


def _is_gathered(w: Tensor, stride: int) -> bool:
    channels, height, width, _ = w.shape
    return w.dtype == torch.bfloat16 and stride > 1 and height == width and channels >= _GATHER_CHANNELS


def _strided(x: Tensor, stride: int) -> Tensor:
    return x if stride == 1 else x[:, ::stride, ::stride].contiguous()


def _matrix(x: Tensor) -> Tensor:
    """[pixels, channels] of an activation, [Cout, Cin] of a 1x1 weight."""
    return x.view(-1, x.shape[-1])
