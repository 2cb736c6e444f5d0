"""What a CPU runs: passes compiled from C++ at first use, convolutions over parts of the batch, packed weights."""

from fastres.ops.cpu import passes
from fastres.ops.cpu.build import unavailable
from fastres.ops.cpu.packed import PackedConv, packed_conv_bias_act, packed_weight, packs
from fastres.ops.cpu.packed_block import FoldedLayer, FoldedLayers, PackedBlock
from fastres.ops.cpu.running import Running

DTYPES = tuple(passes.DTYPES)

__all__ = [
    "DTYPES",
    "FoldedLayer",
    "FoldedLayers",
    "PackedBlock",
    "PackedConv",
    "Running",
    "packed_conv_bias_act",
    "packed_weight",
    "packs",
    "unavailable",
]
