"""The primitives by the Triton kernels of ``fastres.kernels``, and the vendor's convolutions between passes."""

from __future__ import annotations

from torch import Tensor

from fastres import kernels
from fastres.kernels import buffers
from fastres.kernels.geometry import is_pointwise
from fastres.kernels.types import Moments
from fastres.ops.backends.aten import Aten
from fastres.ops.backends.passes import Passes
from fastres.ops.backends.protocol import Activation, Convolution, Gradient, Normalised, Shortcut
from fastres.ops.backends.vendor import VendorConvolutions

# Channels on both sides of a window from which the gradient behind its BatchNorm is made by a pass of its own.
PASS_CHANNELS = 128


class Triton(Passes):
    """See `fastres.ops.backends.protocol.Backend` for each method.

    Args:
        rank: which of their tile configurations the convolutions take, the first at 0.
        dy_once: whether the gradient that both gradients of a convolution read is computed once, not in each of them.
    """

    functions = kernels
    moments = staticmethod(kernels.moments)
    bn_backward_coef = staticmethod(kernels.bn_backward_coef)
    finalize = staticmethod(kernels.finalize)
    running_coef = staticmethod(kernels.running_coef)
    global_avg_pool = staticmethod(kernels.global_avg_pool)
    global_avg_pool_backward = staticmethod(kernels.global_avg_pool_backward)

    def __init__(self, rank: int = 0, dy_once: bool = True):
        self.rank = rank
        self.name = "triton" if rank == 0 else f"triton, tiles {rank + 1}"
        if not dy_once:
            self.name += ", dy in each"
        self.dy_once = dy_once

    def conv(
        self, activation: Activation, conv: Convolution, residual: Tensor | None = None, moments: bool = True
    ) -> tuple[Tensor, Moments | None]:
        weight, stride, pad, dilation = conv
        y, coef = activation
        return kernels.conv(y, weight, stride, pad, coef, residual, moments, rank=self.rank, dilation=dilation)

    def bn_add_relu_conv(
        self, normalised: Normalised, shortcut: Shortcut | None, weight: Tensor, moments: bool = True
    ) -> tuple[Tensor, Tensor, Moments | None]:
        tensor, coef, _ = shortcut or (None, None, 1)
        return kernels.bn_add_relu_conv(*normalised, tensor, coef, weight, moments, rank=self.rank)

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
        """Two kernels; ``joined`` is left alone: to be timed they run again.

        What both read of the BatchNorm's backward, dy, the data gradient of a 1x1 convolution stores while it computes
        it, so that no more bytes move than if each kernel computed it; a window would compute it once a tap, so that of
        many channels a pass of its own is quicker by the model (`bench.machine`), though it moves a tensor more.
        """
        dx = sums = dw = dy = None
        weight, stride, pad, dilation = conv
        if self.dy_once and need_dx and need_dw and gradient.abc is not None:
            if is_pointwise((weight.shape[1], weight.shape[2]), pad):
                dy = buffers.empty(gradient.dz, *gradient.dz.shape)
            elif min(weight.shape[0], weight.shape[3]) >= PASS_CHANNELS:
                gradient = Gradient(self.bn_backward_apply(gradient), None, None)
        if need_dx:
            y, coef = activation
            below, mask = (Normalised(y, coef), None) if coef is not None else (end, None if end is None else y)
            tensor, _, joined_stride = joined or (None, None, 1)
            hw, options = tuple(y.shape[1:3]), dict(residual_stride=joined_stride, rank=self.rank, dilation=dilation)
            dx, sums = kernels.conv_dgrad(*gradient, weight, stride, pad, hw, below, tensor, mask, dy=dy, **options)
        if need_dw:
            made = gradient if dy is None else Gradient(dy, None, None)
            dw = self.conv_wgrad(made, activation, conv)
        return dx, sums, dw

    def conv_dgrad(self, gradient: Gradient, conv: Convolution, hw: tuple[int, int]) -> Tensor:
        weight, stride, pad, dilation = conv
        return kernels.conv_dgrad(*gradient, weight, stride, pad, hw, rank=self.rank, dilation=dilation)[0]

    def conv_wgrad(self, gradient: Gradient, activation: Activation, conv: Convolution) -> Tensor:
        weight, stride, pad, dilation = conv
        kernel = weight.shape[1], weight.shape[2]
        return kernels.conv_wgrad(*gradient, *activation, stride, pad, kernel, rank=self.rank, dilation=dilation)

    def conv_bias_act(
        self, x: Tensor, conv: Convolution, bias: Tensor, residual: Tensor | None = None, relu: bool = True
    ) -> Tensor:
        weight, stride, pad, dilation = conv
        return kernels.conv_bias_act(x, weight, bias, stride, pad, residual, relu, rank=self.rank, dilation=dilation)


class Vendor(VendorConvolutions, Triton):
    """The vendor's convolutions between Triton's passes: what the fused kernels are timed against."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "vendor"

    bn_sums = Aten.bn_sums


class TritonVendorWeights(Triton):
    """Triton's data gradient beside the vendor's weight gradient; otherwise `Triton`."""

    def __init__(self, vendor: Vendor):
        super().__init__()
        self.name = "triton dgrad, vendor wgrad"
        self._vendor = vendor

    def conv_wgrad(self, gradient: Gradient, activation: Activation, conv: Convolution) -> Tensor:
        return self._vendor.conv_wgrad(gradient, activation, conv)
