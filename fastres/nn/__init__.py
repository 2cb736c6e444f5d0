"""Fused modules with the state_dicts of their eager originals, and the ways from one to the other."""

from fastres.nn.blocks import BasicBlock, Bottleneck, ConvBNReLU, PreActBottleneck
from fastres.nn.fold import fold
from fastres.nn.fuse import fuse, unfuse
from fastres.nn.stem import Stem

__all__ = ["BasicBlock", "Bottleneck", "ConvBNReLU", "PreActBottleneck", "Stem", "fold", "fuse", "unfuse"]
