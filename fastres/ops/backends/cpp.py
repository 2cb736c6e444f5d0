"""The primitives of a CPU: passes compiled from C++ at first use, convolutions over cache-sized parts of the batch."""

from __future__ import annotations

from torch import Tensor

from fastres.ops.backends.aten import Aten
from fastres.ops.backends.protocol import Gradient, Normalised, Shortcut, Window
from fastres.ops.cpu import passes
from fastres.ops.cpu.convolutions import PartedConvolutions


class Cpp(PartedConvolutions, Aten):
    """See `fastres.ops.backends.protocol.Backend` for each method; `Aten` has what no pass was written for."""

    name = "cpp"
    moments = staticmethod(passes.moments)
    finalize = staticmethod(passes.finalize)

    def bn_backward_coef(self, sums: Tensor, coef: Tensor, count: int, training: bool) -> tuple[Tensor, Tensor, Tensor]:
        return passes.bn_backward_coef(sums, coef, None, count, training)

    def bn_add_relu(self, normalised: Normalised, shortcut: Shortcut | None = None, relu: bool = True) -> Tensor:
        tensor, coef, stride = shortcut or (None, None, 1)
        return passes.bn_add_relu(*normalised, tensor, coef, relu, stride)

    def bn_add_relu_backward(
        self,
        dout: Tensor,
        out: Tensor | None,
        normalised: Normalised,
        shortcut: Shortcut | None = None,
        in_place: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        tensor, coef, _ = shortcut or (None, None, 1)
        return passes.bn_add_relu_backward(dout, out, *normalised, tensor, coef, in_place)

    def bn_sums(self, dz: Tensor, normalised: Normalised) -> Tensor:
        """The sums [T, 2, C] of dz and of ``dz * xhat`` over blocks of rows."""
        return passes.bn_sums(dz, *normalised)

    def bn_backward_apply(self, gradient: Gradient, residual: Tensor | None = None) -> Tensor:
        dz, y, abc = gradient
        assert abc is not None
        return passes.bn_backward_apply(dz, y, abc, residual)

    def bn_relu_max_pool(self, normalised: Normalised, window: Window) -> tuple[Tensor, Tensor]:
        return passes.bn_relu_max_pool(*normalised, window.kernel, window.stride, window.pad)

    def bn_relu_max_pool_backward(
        self, dout: Tensor, index: Tensor, normalised: Normalised, window: Window
    ) -> tuple[Tensor, Tensor]:
        return passes.bn_relu_max_pool_backward(dout, index, *normalised, window.kernel, window.stride, window.pad)
