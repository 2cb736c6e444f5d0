"""The primitives of a CPU: passes compiled from C++ at first use, convolutions over cache-sized parts of the batch; and
walks over small tensors as programs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from torch import Tensor

from fastres.ops.backends.aten import Aten
from fastres.ops.backends.passes import Passes
from fastres.ops.backends.protocol import Normalised
from fastres.ops.cpu import passes
from fastres.ops.cpu.convolutions import PartedConvolutions
from fastres.ops.cpu.program import Programs


class Cpp(PartedConvolutions, Passes, Aten):
    """See `fastres.ops.backends.protocol.Backend` for each method; `Aten` has what no pass was written for."""

    name = "cpp"
    functions = passes
    moments = staticmethod(passes.moments)
    finalize = staticmethod(passes.finalize)
    running_coef = staticmethod(passes.running_coef)
    bn_backward_coef = staticmethod(passes.bn_backward_coef)

    def __init__(self):
        self.programs = Programs()

    def repeated(
        self, key: Hashable, inputs: Sequence[Tensor | None], walk: Callable[[], list[Tensor]]
    ) -> list[Tensor]:
        """By a program where there is one, see `fastres.ops.cpu.program`."""
        return self.programs.repeated(key, inputs, walk)

    def bn_sums(self, dz: Tensor, normalised: Normalised) -> Tensor:
        """The sums [T, 2, C] of dz and of ``dz * xhat`` over blocks of rows."""
        return passes.bn_sums(dz, normalised.y, normalised.coef)
