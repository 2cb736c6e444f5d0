"""A backend with the launchers' signatures, so that one list of arguments goes to a kernel and to its oracle."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastres.kernels.geometry import Pad
from fastres.ops.backends.aten import Aten
from fastres.ops.backends.protocol import Activation, Convolution, Gradient, Normalised, Shortcut, Window


class Flat:
    """The primitives of a `Backend` (`fastres.ops.backends`) with the names and arguments of ``fastres.kernels``."""

    def __init__(self, backend: Any):
        self.backend = backend
        self.moments, self.finalize, self.running_coef = backend.moments, backend.finalize, backend.running_coef
        self.bn_backward_coef, self.global_avg_pool = backend.bn_backward_coef, backend.global_avg_pool
        self.global_avg_pool_backward = backend.global_avg_pool_backward

    def bn_sums(self, dz: Tensor, y: Tensor, coef: Tensor) -> Tensor:
        return self.backend.bn_sums(dz, Normalised(y, coef))

    def bn_add_relu(
        self,
        y: Tensor,
        coef: Tensor,
        shortcut: Tensor | None = None,
        shortcut_coef: Tensor | None = None,
        relu: bool = True,
        shortcut_stride: int = 1,
    ) -> Tensor:
        return self.backend.bn_add_relu(Normalised(y, coef), _shortcut(shortcut, shortcut_coef, shortcut_stride), relu)

    def bn_add_relu_backward(
        self,
        dout: Tensor,
        out: Tensor | None,
        y: Tensor,
        coef: Tensor,
        shortcut: Tensor | None = None,
        shortcut_coef: Tensor | None = None,
        in_place: bool = False,
    ) -> Any:
        added = None if shortcut_coef is None else _shortcut(shortcut, shortcut_coef, 1)
        return self.backend.bn_add_relu_backward(dout, out, Normalised(y, coef), added, in_place)

    def bn_backward_apply(self, dz: Tensor, y: Tensor | None, abc: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.backend.bn_backward_apply(Gradient(dz, y, abc), residual)

    def bn_relu_max_pool(self, y: Tensor, coef: Tensor, kernel: int, stride: int, pad: Pad) -> Any:
        return self.backend.bn_relu_max_pool(Normalised(y, coef), Window(kernel, stride, pad))

    def bn_relu_max_pool_backward(
        self, dout: Tensor, index: Tensor, y: Tensor, coef: Tensor, kernel: int, stride: int, pad: Pad
    ) -> Any:
        return self.backend.bn_relu_max_pool_backward(dout, index, Normalised(y, coef), Window(kernel, stride, pad))

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
    ) -> Any:
        return self.backend.conv(Activation(x, coef), Convolution(w, stride, pad, dilation), residual, moments)

    def bn_add_relu_conv(
        self,
        y: Tensor,
        coef: Tensor,
        shortcut: Tensor | None,
        shortcut_coef: Tensor | None,
        w: Tensor,
        moments: bool = True,
    ) -> Any:
        return self.backend.bn_add_relu_conv(Normalised(y, coef), _shortcut(shortcut, shortcut_coef, 1), w, moments)

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
        return self.backend.conv_bias_act(x, Convolution(w, stride, pad, dilation), bias, residual, relu)

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
        dilation: int = 1,
    ) -> Any:
        below = None if end is None else Normalised(*end)
        conv, joined = Convolution(w, stride, pad, dilation), _shortcut(residual, None, residual_stride)
        return self.backend.conv_backward(
            Gradient(dz, y, abc), Activation(x, coef), conv, joined, below, need_dx, need_dw
        )

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
    ) -> Any:
        x, coef = below or (dz.new_empty(1).expand(dz.shape[0], *input_hw, w.shape[3]), None)
        end = None
        if mask is not None:
            x, coef, end = mask, None, below
        options = dict(need_dw=False, end=end, residual_stride=residual_stride, dilation=dilation)
        return self.conv_backward(dz, y, abc, x, coef, w, stride, pad, residual, **options)[:2]

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
        w = dz.new_empty(1).expand(dz.shape[3], *kernel_hw, x.shape[3])
        conv = Convolution(w, stride, pad, dilation)
        return self.backend.conv_backward(Gradient(dz, y, abc), Activation(x, coef), conv, need_dx=False)[2]


def _shortcut(tensor: Tensor | None, coef: Tensor | None, stride: int) -> Shortcut | None:
    return None if tensor is None else Shortcut(tensor, coef, stride)


aten = Flat(Aten())
