"""The primitives for CPUs: passes compiled from C++ at first use, convolutions over cache-sized parts of the batch."""

from __future__ import annotations

from types import SimpleNamespace

from fastres.ops.cpu import packed, passes
from fastres.ops.cpu.build import unavailable
from fastres.ops.cpu.convolutions import PartedConvolutions
from fastres.ops.cpu.onednn import takes as packs
from fastres.ops.cpu.packed import PackedConv, packed_weight

_PASSES = (
    "moments finalize running_coef bn_add_relu bn_add_relu_backward bn_sums bn_backward_coef "
    "bn_backward_apply bn_relu_max_pool bn_relu_max_pool_backward global_avg_pool global_avg_pool_backward"
)
_CONVOLUTIONS = "conv bn_add_relu_conv conv_dgrad conv_wgrad conv_backward conv_bias_act"


DTYPES = tuple(passes.DTYPES)

__all__ = ["DTYPES", "PackedConv", "packed_weight", "packs", "primitives", "unavailable"]


def primitives() -> SimpleNamespace:
    """Every primitive by its name, see `fastres.ops.aten`; for where they are not `unavailable`."""
    convolutions = PartedConvolutions()
    sources = [(passes, _PASSES), (convolutions, _CONVOLUTIONS)]
    if packed.AVAILABLE:
        sources.append((packed, "packed_conv_bias_act"))
    return SimpleNamespace(**{name: getattr(source, name) for source, names in sources for name in names.split()})
