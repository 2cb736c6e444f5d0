"""The primitives' results as tensors without values: what the fused operations tell torch.compile of their results."""

from __future__ import annotations

import torch
from torch import Tensor

from fastres.kernels.geometry import output_hw
from fastres.kernels.types import Moments
from fastres.ops.backends.protocol import (
    Activation,
    Backend,
    Convolution,
    Gradient,
    Normalised,
    Shortcut,
    Window,
    statistics_dtype,
)


class Fake(Backend):
    """See `fastres.ops.backends.protocol.Backend`; shapes, dtypes and layouts are a real backend's.

    But all statistics and sums are of one tile: their number of tiles is no result of any operation.
    """

    name = "fake"

    def moments(self, y: Tensor) -> Moments:
        dtype, channels = statistics_dtype(y.dtype), y.shape[3]
        return Moments(y.new_empty(1, dtype=dtype), *y.new_empty(2, 1, channels, dtype=dtype).unbind())

    def finalize(self, moments: Moments, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
        return moments.mean.new_empty(5, moments.mean.shape[1])

    def running_coef(
        self, running_mean: Tensor, running_var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
    ) -> Tensor:
        return running_mean.new_empty(5, running_mean.shape[0], dtype=statistics_dtype(running_mean.dtype))

    def bn_backward_coef(self, sums: Tensor, coef: Tensor, count: int, training: bool) -> tuple[Tensor, Tensor, Tensor]:
        channels = sums.shape[2]
        return sums.new_empty(3, channels), sums.new_empty(channels), sums.new_empty(channels)

    def bn_add_relu(self, normalised: Normalised, shortcut: Shortcut | None = None, relu: bool = True) -> Tensor:
        return torch.empty_like(normalised.y)

    def bn_add_relu_backward(
        self,
        dout: Tensor,
        out: Tensor | None,
        normalised: Normalised,
        shortcut: Shortcut | None = None,
        in_place: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        return torch.empty_like(dout), _sums(dout), None if shortcut is None else _sums(dout)

    def bn_backward_apply(self, gradient: Gradient, residual: Tensor | None = None) -> Tensor:
        return torch.empty_like(gradient.dz)

    def bn_relu_max_pool(self, normalised: Normalised, window: Window) -> tuple[Tensor, Tensor]:
        y, (kernel, stride, pad) = normalised.y, window
        hw = output_hw((y.shape[1], y.shape[2]), (kernel, kernel), stride, pad)
        out = y.new_empty(y.shape[0], *hw, y.shape[3])
        return out, torch.empty_like(out, dtype=torch.uint8)

    def bn_relu_max_pool_backward(
        self, dout: Tensor, index: Tensor, normalised: Normalised, window: Window
    ) -> tuple[Tensor, Tensor]:
        return torch.empty_like(normalised.y), _sums(normalised.y)

    def global_avg_pool(self, x: Tensor) -> Tensor:
        return x.new_empty(x.shape[0], x.shape[3])

    def global_avg_pool_backward(self, dout: Tensor, hw: tuple[int, int]) -> Tensor:
        return dout.new_empty(dout.shape[0], *hw, dout.shape[1])

    def conv(
        self, activation: Activation, conv: Convolution, residual: Tensor | None = None, moments: bool = True
    ) -> tuple[Tensor, Moments | None]:
        y = activation.y.new_empty(conv.shape_of(activation.y))
        return y, self.moments(y) if moments else None

    def bn_add_relu_conv(
        self, normalised: Normalised, shortcut: Shortcut | None, weight: Tensor, moments: bool = True
    ) -> tuple[Tensor, Tensor, Moments | None]:
        return torch.empty_like(normalised.y), *self.conv(Activation(normalised.y), Convolution(weight), None, moments)

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
        dw = self.conv_wgrad(gradient, activation, conv) if need_dw else None
        if not need_dx:
            return None, None, dw
        through_relu = activation.coef is not None or end is not None
        return torch.empty_like(activation.y), _sums(activation.y) if through_relu else None, dw

    def conv_dgrad(self, gradient: Gradient, conv: Convolution, hw: tuple[int, int]) -> Tensor:
        return gradient.dz.new_empty(gradient.dz.shape[0], *hw, conv.weight.shape[3])

    def conv_wgrad(self, gradient: Gradient, activation: Activation, conv: Convolution) -> Tensor:
        return torch.empty_like(conv.weight, dtype=statistics_dtype(conv.weight.dtype))

    def conv_bias_act(
        self, x: Tensor, conv: Convolution, bias: Tensor, residual: Tensor | None = None, relu: bool = True
    ) -> Tensor:
        return self.conv(Activation(x), conv, None, moments=False)[0]

    def all_reduce(self, tensor: Tensor, group: str) -> None:
        """Nothing travels."""


def _sums(dz: Tensor) -> Tensor:
    return dz.new_empty(1, 2, dz.shape[3], dtype=statistics_dtype(dz.dtype))
