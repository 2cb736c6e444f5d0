"""The convolution primitives by the vendor's library (cuDNN, oneDNN), through PyTorch, between separate passes.

`fastres.ops.backends.aten` puts ATen's passes around them. On a GPU Triton's passes around them are the candidate that
the fused kernels are timed against.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.kernels.geometry import Pad
from fastres.kernels.types import Moments
from fastres.ops.backends.protocol import Activation, Backend, Convolution, Gradient, Normalised, Shortcut

_aten = torch.ops.aten


class VendorConvolutions(Backend):
    """The convolution primitives, around the passes of the class that inherits them."""

    def bn_sums(self, dz: Tensor, normalised: Normalised) -> Tensor:
        """The sums [T, 2, C] of dz and of ``dz * xhat`` over tiles of pixels."""
        raise NotImplementedError

    def conv(
        self, activation: Activation, conv: Convolution, residual: Tensor | None = None, moments: bool = True
    ) -> tuple[Tensor, Moments | None]:
        y = convolve(self._read(activation), conv)
        if residual is not None:
            y += residual
        return y, self.moments(y) if moments else None

    def bn_add_relu_conv(
        self, normalised: Normalised, shortcut: Shortcut | None, weight: Tensor, moments: bool = True
    ) -> tuple[Tensor, Tensor, Moments | None]:
        out = self.bn_add_relu(normalised, shortcut)
        return out, *self.conv(Activation(out), Convolution(weight), None, moments)

    def conv_bias_act(
        self, x: Tensor, conv: Convolution, bias: Tensor, residual: Tensor | None = None, relu: bool = True
    ) -> Tensor:
        y = convolve(x, conv, bias.to(x.dtype))
        if residual is not None:
            y += residual
        return y.relu_() if relu else y

    def conv_backward(
        self,
        gradient: Gradient,
        activation: Activation,
        conv: Convolution,
        joined: Shortcut | None = None,
        end: Normalised | None = None,
        need_dx: bool = True,
        need_dw: bool = True,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Dy is computed once for both gradients."""
        if not need_dx and not need_dw:
            return None, None, None
        dy = gradient.dz if gradient.abc is None else self.bn_backward_apply(gradient)
        a = self._read(activation)
        dx, dw = convolve_backward(dy, a, conv, need_dx, need_dw)
        if dx is None:
            return None, None, dw
        if activation.coef is not None:
            end = activation.normalised
        if end is not None:
            return *self.through(dx, a, end, joined, ends=activation.coef is None), dw
        if joined is not None:
            add_gradient(dx, joined)
        return dx, None, dw

    def through(
        self, dx: Tensor, a: Tensor, normalised: Normalised, joined: Shortcut | None, ends: bool
    ) -> tuple[Tensor, Tensor]:
        """The gradient dz in front of an activation and the sums [T, 2, C] of the BatchNorm before it.

        Args:
            dx: the gradient behind the activation, whose memory may be overwritten.
            a: the activation.
            joined: what is added to dx.
            ends: whether a is the end of a block, whose ReLU comes behind the addition of a shortcut.
        """
        if joined is not None:
            add_gradient(dx, joined)
        relu = ends or normalised.act == "relu"
        dz = _aten.threshold_backward(dx, a, 0) if relu else self._through(dx, normalised)
        return dz, self.bn_sums(dz, normalised)

    def conv_dgrad(self, gradient: Gradient, conv: Convolution, hw: tuple[int, int]) -> Tensor:
        dz, weight = gradient.dz, conv.weight
        x = dz.new_empty(1).expand(dz.shape[0], *hw, weight.shape[3])
        dx = self.conv_backward(gradient, Activation(x), conv, need_dw=False)[0]
        assert dx is not None
        return dx

    def conv_wgrad(self, gradient: Gradient, activation: Activation, conv: Convolution) -> Tensor:
        dw = self.conv_backward(gradient, activation, conv, need_dx=False)[2]
        assert dw is not None
        return dw

    def _read(self, activation: Activation) -> Tensor:
        return activation.y if activation.coef is None else self.bn_add_relu(activation.normalised)

    def _through(self, dout: Tensor, normalised: Normalised) -> Tensor:
        """The gradient at a BatchNorm's result from that of its activation, which is computed again."""
        if normalised.act == "gelu":
            return _aten.gelu_backward(dout, self.bn_add_relu(normalised, relu=False))
        return _aten.threshold_backward(dout, self.bn_add_relu(normalised), 0)


def convolve(x: Tensor, conv: Convolution, bias: Tensor | None = None) -> Tensor:
    """PyTorch's convolution of NHWC x, NHWC."""
    weight, stride, pad, dilation = conv
    x, padding = padded(x, pad)
    return nhwc(F.conv2d(nchw(x), nchw(weight), bias, stride, padding, dilation))


def convolve_backward(
    dy: Tensor, a: Tensor, conv: Convolution, need_dx: bool, need_dw: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Its gradients at the input a and, in fp32 or fp64, of the weight; None where not needed."""
    weight, stride, pad, dilation = conv
    height, width = a.shape[1:3]
    a, padding = padded(a, pad)
    geometry = [stride] * 2, padding, [dilation] * 2, False, [0, 0], 1
    dx, dw, _ = _aten.convolution_backward(nchw(dy), nchw(a), nchw(weight), None, *geometry, [need_dx, need_dw, False])
    if dx is not None:
        top, left = (pad[0], pad[1]) if a.shape[1:3] != (height, width) else (0, 0)
        dx = nhwc(dx[:, :, top : top + height, left : left + width])
    if dw is not None:
        dw = nhwc(dw if dw.dtype == torch.float64 else dw.float())
    return dx, dw


def padded(x: Tensor, pad: Pad) -> tuple[Tensor, list[int]]:
    """x and the symmetric padding that is left to the convolution; TensorFlow's 'SAME' needs a padded copy."""
    top, left, bottom, right = pad
    if (top, left) == (bottom, right):
        return x, [top, left]
    return F.pad(x, (0, 0, left, right, top, bottom)), [0, 0]


def add_shortcut(out: Tensor, shortcut: Tensor, stride: int) -> None:
    """In place: add every ``stride``-th pixel of the shortcut to as many of the first channels as it has."""
    out[..., : shortcut.shape[3]] += shortcut[:, ::stride, ::stride]


def add_gradient(dx: Tensor, joined: Shortcut) -> None:
    """In place, the gradient of `add_shortcut`: add the first channels of it to every ``stride``-th pixel."""
    stride = joined.stride
    dx[:, ::stride, ::stride] += joined.tensor[..., : dx.shape[3]]


def nchw(x: Tensor) -> Tensor:
    """NHWC as PyTorch's functions take it, in channels-last memory."""
    return x.permute(0, 3, 1, 2)


def nhwc(x: Tensor) -> Tensor:
    """NCHW as NHWC; a view of channels-last memory."""
    return x.permute(0, 2, 3, 1).contiguous()
