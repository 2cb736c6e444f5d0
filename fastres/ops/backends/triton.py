"""The primitives by the Triton kernels of ``fastres.kernels``, and the vendor's convolutions between passes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from enum import Enum

from torch import Tensor

from fastres import kernels
from fastres.kernels import buffers, parts
from fastres.kernels.configs import note
from fastres.kernels.geometry import is_pointwise
from fastres.kernels.types import Moments
from fastres.ops.backends import vendor
from fastres.ops.backends.passes import Passes
from fastres.ops.backends.protocol import Activation, Convolution, Gradient, Normalised, Shortcut
from fastres.ops.backends.replay import Programs
from fastres.ops.backends.vendor import VendorConvolutions

# By the model (`bench.machine`): channels on both sides of a window from which, for the fewest bytes, its data gradient
# stores the gradient behind its BatchNorm, and from which a pass of its own makes that; channels on either side (of a
# strided window on both) from which the activation is best stored, too.
STORED_CHANNELS, PASS_CHANNELS, WIDE_CHANNELS = 64, 128, 64


JOINT = "both gradients at once"


class Way(Enum):
    """How the two gradients of a convolution share what both read: dy of the BatchNorm's backward, and the activation.

    Each moves a tensor more or less, and computes dy once or once a tap of a window. `ONCE` moves no more than `EACH`
    but for the passes of wide windows.
    """

    # One kernel for both gradients of a pointwise convolution where there is one, `STORED` for wide windows and for
    # those behind GELU, or else `ONCE`.
    MODEL = "as the model has it"
    ONCE = "dy once"  # stored by the data gradient, by a pass for windows of many channels, in each for those of few
    EACH = "dy in each"
    PASS = "dy by a pass"  # for all windows
    STORED = "dy by a pass, activation stored"  # and a window reads a pass's activation, its data gradient stores it


class Triton(Passes):
    """See `fastres.ops.backends.protocol.Backend` for each method.

    Args:
        rank: which of their tile configurations the convolutions take, the first at 0.
        way: how a convolution's gradients share what both read.
    """

    functions = kernels
    moments = staticmethod(kernels.moments)
    bn_backward_coef = staticmethod(kernels.bn_backward_coef)
    finalize = staticmethod(kernels.finalize)
    running_coef = staticmethod(kernels.running_coef)
    global_avg_pool = staticmethod(kernels.global_avg_pool)
    global_avg_pool_backward = staticmethod(kernels.global_avg_pool_backward)

    def __init__(self, rank: int = 0, way: Way = Way.MODEL):
        self.rank, self.way, self.programs = rank, way, Programs()
        self.name = "triton" if rank == 0 else f"triton, tiles {rank + 1}"
        if way is not Way.MODEL:
            self.name += f", {way.value}"

    def repeated(
        self, key: Hashable, inputs: Sequence[Tensor | None], walk: Callable[[], list[Tensor]]
    ) -> list[Tensor]:
        """By launches that were noted where there are some, see `fastres.ops.backends.replay`.

        The weights' gradients are filled in by launches of other small work, see `fastres.kernels.parts`.
        """

        def joined() -> list[Tensor]:
            with parts.joining():
                return walk()

        return self.programs.repeated(key, inputs, joined)

    def conv(
        self, activation: Activation, conv: Convolution, residual: Tensor | None = None, moments: bool = True
    ) -> tuple[Tensor, Moments | None]:
        weight, stride, pad, dilation = conv
        if self._is_window(conv) and activation.coef is not None and self._way_of(activation, conv) is Way.STORED:
            note("activation by a pass")
            activation = Activation(self.bn_add_relu(activation.normalised))
        y, coef, act = activation
        return kernels.conv(y, weight, stride, pad, coef, residual, moments, self.rank, dilation, act)

    def bn_add_relu_conv(
        self, normalised: Normalised, shortcut: Shortcut | None, weight: Tensor, moments: bool = True
    ) -> tuple[Tensor, Tensor, Moments | None]:
        tensor, coef, _ = shortcut or (None, None, 1)
        return kernels.bn_add_relu_conv(*normalised[:2], tensor, coef, weight, moments, rank=self.rank)

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
        """One kernel or two, and perhaps a pass; ``joined`` is left alone: to be timed they run again.

        Of a pointwise convolution of up to 256 channels one kernel reads everything once and makes both gradients.
        Otherwise, what both read of the BatchNorm's backward, dy, a pointwise data gradient stores while it computes
        it, so that no more bytes move than if each kernel computed it. A window computes it once a tap, and once more
        for the weights, so that by the model (`bench.machine`) a pass of its own is quicker, though it moves a tensor
        more. So it is with the activation, which the data gradient of a wide window stores for the weights'.
        """
        dx = sums = dw = dy = a = None
        weight, stride, pad, dilation = conv
        pointwise, both = not self._is_window(conv), need_dx and need_dw
        if both and self._is_joint(activation, conv, joined):
            note(JOINT)
            x, coef, mask = (*activation[:2], None) if end is None else (*end[:2], activation.y)
            return kernels.conv_grads(*gradient, weight, x, coef, mask, joined and joined.tensor, self.rank)
        way = self._way_of(activation, conv)
        if both and gradient.abc is not None and way is not Way.EACH:
            least = min(weight.shape[0], weight.shape[3])
            if not pointwise and (way is not Way.ONCE or least >= PASS_CHANNELS):
                note(Way.PASS.value)
                gradient = Gradient(self.bn_backward_apply(gradient), None, None)
            elif pointwise or (least >= STORED_CHANNELS and conv.is_centred(activation.y)):
                note(Way.ONCE.value)
                dy = buffers.empty(gradient.dz, *gradient.dz.shape)
        if both and not pointwise and activation.coef is not None and way is Way.STORED:
            note(Way.STORED.value)
            a = buffers.empty(activation.y, *activation.y.shape)
        if need_dx:
            y, coef, act = activation
            below, mask = ((y, coef), None) if coef is not None else (end and end[:2], None if end is None else y)
            tensor, _, joined_stride = joined or (None, None, 1)
            hw, options = tuple(y.shape[1:3]), dict(residual_stride=joined_stride, rank=self.rank, dilation=dilation)
            kept = dict(dy=dy, activation=a, act=act)
            dx, sums = kernels.conv_dgrad(*gradient, weight, stride, pad, hw, below, tensor, mask, **kept, **options)
        if need_dw:
            made = gradient if dy is None else Gradient(dy, None, None)
            dw = self.conv_wgrad(made, self._once(activation, conv) if a is None else Activation(a), conv)
        return dx, sums, dw

    def _way_of(self, activation: Activation, conv: Convolution) -> Way:
        """The way of a convolution's gradients, `Way.MODEL` resolved."""
        if self.way is not Way.MODEL:
            return self.way
        of = max if conv.stride == 1 else min
        wide = of(conv.weight.shape[0], conv.weight.shape[3]) >= WIDE_CHANNELS
        return Way.STORED if wide or activation.act == "gelu" else Way.ONCE

    def _is_joint(self, activation: Activation, conv: Convolution, joined: Shortcut | None) -> bool:
        """Whether one kernel makes both gradients."""
        cout, _, _, cin = conv.weight.shape
        return (
            self.way is Way.MODEL
            and conv.stride == 1
            and not self._is_window(conv)
            and (activation.coef is None or activation.act == "relu")
            and (joined is None or joined.tensor.shape == activation.y.shape)
            and kernels.is_joint(cin, cout, conv.weight.dtype, conv.weight.device)
        )

    def _once(self, activation: Activation, conv: Convolution) -> Activation:
        """What a weight gradient reads: GELU in front of a window is computed by a pass, not once a tap and tile of
        columns, which by the model takes up to four times the product's time.
        """
        if activation.coef is None or activation.act != "gelu" or not self._is_window(conv):
            return activation
        return Activation(self.bn_add_relu(activation.normalised))

    @staticmethod
    def _is_window(conv: Convolution) -> bool:
        """Whether a convolution is more than a product over channels."""
        return not is_pointwise((conv.weight.shape[1], conv.weight.shape[2]), conv.pad)

    def conv_dgrad(self, gradient: Gradient, conv: Convolution, hw: tuple[int, int]) -> Tensor:
        weight, stride, pad, dilation = conv
        return kernels.conv_dgrad(*gradient, weight, stride, pad, hw, rank=self.rank, dilation=dilation)[0]

    def conv_wgrad(self, gradient: Gradient, activation: Activation, conv: Convolution) -> Tensor:
        weight, stride, pad, dilation = conv
        kernel, (y, coef, act) = (weight.shape[1], weight.shape[2]), activation
        options = dict(rank=self.rank, dilation=dilation, act=act)
        return kernels.conv_wgrad(*gradient, y, coef, stride, pad, kernel, **options)

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

    def through(
        self, dx: Tensor, a: Tensor, normalised: Normalised, joined: Shortcut | None, ends: bool
    ) -> tuple[Tensor, Tensor]:
        """In one pass."""
        y, coef, act = normalised
        added = joined and joined.tensor
        if joined is not None and (joined.stride != 1 or joined.tensor.shape != dx.shape):
            vendor.add_gradient(dx, joined)
            added = None
        return kernels.bn_act_backward(dx, y, coef, a if ends else None, added, act, in_place=True)


class TritonVendorWeights(Triton):
    """Triton's data gradient beside the vendor's weight gradient; otherwise `Triton`."""

    def __init__(self, library: Vendor):
        super().__init__()
        self.name = "triton dgrad, vendor wgrad"
        self._vendor = library

    def _is_joint(self, activation: Activation, conv: Convolution, joined: Shortcut | None) -> bool:
        return False

    def conv_wgrad(self, gradient: Gradient, activation: Activation, conv: Convolution) -> Tensor:
        return self._vendor.conv_wgrad(gradient, activation, conv)
