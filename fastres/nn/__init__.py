"""Fused modules with the state_dicts of their eager originals, and the ways from one to the other."""

from fastres.nn.adapters import BasicBlock, Bottleneck, ConvBNReLU, PreActBottleneck, Stem
from fastres.nn.fold import fold, repack
from fastres.nn.fuse import fuse, unfuse
from fastres.nn.report import Report, report
from fastres.nn.roles import declare_convolution, declare_pool, declare_shortcut
from fastres.nn.structure import Block, Stages, register_block, register_network

__all__ = [
    "BasicBlock",
    "Block",
    "Bottleneck",
    "ConvBNReLU",
    "PreActBottleneck",
    "Report",
    "Stages",
    "Stem",
    "declare_convolution",
    "declare_pool",
    "declare_shortcut",
    "fold",
    "fuse",
    "register_block",
    "register_network",
    "repack",
    "report",
    "unfuse",
]
