"""The passes of a backend by functions with plain arguments: Triton's launchers, or a CPU's compiled passes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastres.ops.backends.protocol import Backend, Gradient, Normalised, Shortcut, Window


class Passes(Backend):
    """Unpacks the records for the functions of one module, see `Backend` for each method.

    Attributes:
        functions: the module; of the class that inherits this.
    """

    functions: Any

    def bn_add_relu(self, normalised: Normalised, shortcut: Shortcut | None = None, relu: bool = True) -> Tensor:
        tensor, coef, stride = shortcut or (None, None, 1)
        y, of_y, act = normalised
        return self.functions.bn_add_relu(y, of_y, tensor, coef, relu, stride, act)

    def bn_add_relu_backward(
        self,
        dout: Tensor,
        out: Tensor | None,
        normalised: Normalised,
        shortcut: Shortcut | None = None,
        in_place: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        tensor, coef, _ = shortcut or (None, None, 1)
        y, of_y, act = normalised
        return self.functions.bn_add_relu_backward(dout, out, y, of_y, tensor, coef, in_place, act)

    def bn_backward_apply(self, gradient: Gradient, residual: Tensor | None = None) -> Tensor:
        assert gradient.abc is not None
        return self.functions.bn_backward_apply(*gradient, residual)

    def bn_relu_max_pool(self, normalised: Normalised, window: Window) -> tuple[Tensor, Tensor]:
        y, coef, act = normalised
        return self.functions.bn_relu_max_pool(y, coef, *window, act)

    def bn_relu_max_pool_backward(
        self, dout: Tensor, index: Tensor, normalised: Normalised, window: Window
    ) -> tuple[Tensor, Tensor]:
        y, coef, act = normalised
        return self.functions.bn_relu_max_pool_backward(dout, index, y, coef, *window, act)
