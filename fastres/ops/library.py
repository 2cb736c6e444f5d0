"""Convolution primitives made of PyTorch's own convolution and separate elementwise passes.

With ATen's passes they are the CPU's implementation; with the Triton passes they are the candidate on a GPU that a
fused kernel has to beat: normalise in one pass, then the vendor's convolution.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.kernels.geometry import Pad
from fastres.kernels.types import Moments

_aten = torch.ops.aten


class LibraryConvolutions:
    """The convolution primitives, around an implementation of the elementwise ones.

    Args:
        moments: ``y -> Moments``.
        normalise: ``bn_add_relu``.
        apply: ``bn_backward_apply``.
        sums: ``(dz, y, coef) -> sums``.
    """

    def __init__(self, moments: Callable, normalise: Callable, apply: Callable, sums: Callable):
        self._moments, self._normalise, self._apply, self._sums = moments, normalise, apply, sums

    def conv(
        self,
        x: Tensor,
        w: Tensor,
        stride: int,
        pad: Pad,
        coef: Tensor | None = None,
        residual: Tensor | None = None,
        moments: bool = True,
        dilation: int = 1,
    ) -> tuple[Tensor, Moments | None]:
        """``y = conv2d(relu(x*scale + shift), w) (+ residual)`` and the statistics of y."""
        y = convolve(x if coef is None else self._normalise(x, coef), w, None, stride, pad, dilation)
        if residual is not None:
            y += residual
        return y, self._moments(y) if moments else None

    def bn_add_relu_conv(
        self,
        y: Tensor,
        coef: Tensor,
        shortcut: Tensor | None,
        shortcut_coef: Tensor | None,
        w: Tensor,
        moments: bool = True,
    ) -> tuple[Tensor, Tensor, Moments | None]:
        """``out = relu(bn(y) + shortcut)``, and of out the convolution with w [Cout, 1, 1, Cin] with its statistics."""
        out = self._normalise(y, coef, shortcut, shortcut_coef)
        return out, *self.conv(out, w, 1, (0, 0, 0, 0), moments=moments)

    def conv_bias_act(
        self,
        x: Tensor,
        w: Tensor,
        bias: Tensor,
        stride: int,
        pad: Pad,
        residual: Tensor | None = None,
        relu: bool = True,
        dilation: int = 1,
    ) -> Tensor:
        """``relu(conv2d(x, w) + bias (+ residual))``."""
        y = convolve(x, w, bias.to(x.dtype), stride, pad, dilation)
        if residual is not None:
            y += residual
        return y.relu_() if relu else y

    def conv_backward(
        self,
        dz: Tensor,
        y: Tensor | None,
        abc: Tensor | None,
        x: Tensor,
        coef: Tensor | None,
        w: Tensor,
        stride: int,
        pad: Pad,
        residual: Tensor | None = None,
        need_dx: bool = True,
        need_dw: bool = True,
        end: tuple[Tensor, Tensor] | None = None,
        residual_stride: int = 1,
        spare: bool = False,
        dilation: int = 1,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """`conv_dgrad` and `conv_wgrad` together: (dx, sums, dw), dy computed once.

        dy is ``A*dz + B*y + C``, without y ``A*dz``, without ``abc`` dz.
        With ``coef`` dx goes through the ReLU of ``relu(x*scale + shift)``. With ``end = (y, coef)`` x is the end of a
        block, ``relu(bn(y) + shortcut)``, and dx goes through that ReLU. Either way the sums are of that BatchNorm.
        The residual is like x, or its first channels are added to every ``residual_stride``-th pixel of dx; ``spare``:
        nobody needs it afterwards, so that dx may take its memory.
        """
        if not need_dx and not need_dw:
            return None, None, None
        dy = dz if abc is None else self._apply(dz, y, abc)
        a = x if coef is None else self._normalise(x, coef)
        dx, dw = convolve_backward(dy, a, w, stride, pad, need_dx, need_dw, dilation)
        if dx is None:
            return None, None, dw
        if residual is not None:
            add_residual(dx, residual, residual_stride)
        below = end if coef is None else (x, coef)
        if below is None:
            return dx, None, dw
        dx = _aten.threshold_backward(dx, a, 0)
        return dx, self._sums(dx, *below), dw

    def conv_dgrad(
        self,
        dz: Tensor,
        y: Tensor | None,
        abc: Tensor | None,
        w: Tensor,
        stride: int,
        pad: Pad,
        input_hw: tuple[int, int],
        below: tuple[Tensor, Tensor] | None = None,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        residual_stride: int = 1,
        dilation: int = 1,
    ) -> tuple[Tensor, Tensor | None]:
        """Gradient at the convolution's input, or through the ReLU of ``below`` with its BatchNorm's sums.

        ``mask``: what the convolution read, where ReLU came after the addition of a shortcut to that BatchNorm.
        """
        x, coef = below or (dz.new_empty(1).expand(dz.shape[0], *input_hw, w.shape[3]), None)
        end = None
        if mask is not None:
            x, coef, end = mask, None, below
        arguments = dz, y, abc, x, coef, w, stride, pad, residual
        dx, sums, _ = self.conv_backward(
            *arguments, need_dw=False, end=end, residual_stride=residual_stride, dilation=dilation
        )
        return dx, sums

    def conv_wgrad(
        self,
        dz: Tensor,
        y: Tensor | None,
        abc: Tensor | None,
        x: Tensor,
        coef: Tensor | None,
        stride: int,
        pad: Pad,
        kernel_hw: tuple[int, int],
        dilation: int = 1,
    ) -> Tensor:
        """Gradient of the weight, fp32 [Cout, KH, KW, Cin]."""
        w = dz.new_empty(1).expand(dz.shape[3], *kernel_hw, x.shape[3])
        return self.conv_backward(dz, y, abc, x, coef, w, stride, pad, need_dx=False, dilation=dilation)[2]


def convolve(x: Tensor, w: Tensor, bias: Tensor | None, stride: int, pad: Pad, dilation: int = 1) -> Tensor:
    """PyTorch's convolution of NHWC x, NHWC."""
    x, padding = padded(x, pad)
    return nhwc(F.conv2d(nchw(x), nchw(w), bias, stride, padding, dilation))


def convolve_backward(
    dy: Tensor, a: Tensor, w: Tensor, stride: int, pad: Pad, need_dx: bool, need_dw: bool, dilation: int = 1
) -> tuple[Tensor | None, Tensor | None]:
    """Its gradients at the input a and, in fp32 or fp64, of w; None where not needed."""
    height, width = a.shape[1:3]
    a, padding = padded(a, pad)
    geometry = [stride] * 2, padding, [dilation] * 2, False, [0, 0], 1
    dx, dw, _ = _aten.convolution_backward(nchw(dy), nchw(a), nchw(w), None, *geometry, [need_dx, need_dw, False])
    if dx is not None:
        top, left = (pad[0], pad[1]) if a.shape[1:3] != (height, width) else (0, 0)
        dx = nhwc(dx[:, :, top : top + height, left : left + width])
    if dw is not None:
        dw = nhwc(dw if dw.dtype == torch.float64 else dw.float())
    return dx, dw


def padded(x: Tensor, pad: Pad) -> tuple[Tensor, list[int]]:
    """Symmetric padding is left to the convolution; TensorFlow's 'SAME' needs a copy."""
    top, left, bottom, right = pad
    if (top, left) == (bottom, right):
        return x, [top, left]
    return F.pad(x, (0, 0, left, right, top, bottom)), [0, 0]


def add_shortcut(out: Tensor, shortcut: Tensor, stride: int) -> None:
    """In place: add every ``stride``-th pixel of the shortcut to as many of the first channels as it has."""
    out[..., : shortcut.shape[3]] += shortcut[:, ::stride, ::stride]


def add_residual(dx: Tensor, residual: Tensor, stride: int) -> None:
    """In place, the gradient of `add_shortcut`: add the residual's first channels to every ``stride``-th pixel."""
    dx[:, ::stride, ::stride] += residual[..., : dx.shape[3]]


def nchw(x: Tensor) -> Tensor:
    """NHWC as PyTorch's functions take it, in channels-last memory."""
    return x.permute(0, 3, 1, 2)


def nhwc(x: Tensor) -> Tensor:
    """NCHW as NHWC; a view of channels-last memory."""
    return x.permute(0, 2, 3, 1).contiguous()
