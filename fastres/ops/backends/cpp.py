"""The primitives of a CPU: passes compiled from C++ at first use, convolutions over cache-sized parts of the batch."""

from __future__ import annotations

from torch import Tensor

from fastres.ops.backends.aten import Aten
from fastres.ops.backends.passes import Passes
from fastres.ops.backends.protocol import Normalised
from fastres.ops.cpu import passes
from fastres.ops.cpu.convolutions import PartedConvolutions


class Cpp(PartedConvolutions, Passes, Aten):
    """See `fastres.ops.backends.protocol.Backend` for each method; `Aten` has what no pass was written for."""

    name = "cpp"
    functions = passes
    moments = staticmethod(passes.moments)
    finalize = staticmethod(passes.finalize)
    bn_backward_coef = staticmethod(passes.bn_backward_coef)

    def bn_sums(self, dz: Tensor, normalised: Normalised) -> Tensor:
        """The sums [T, 2, C] of dz and of ``dz * xhat`` over blocks of rows."""
        return passes.bn_sums(dz, *normalised)
