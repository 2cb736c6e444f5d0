"""What `fastres.reference.notebook` is made of."""

from __future__ import annotations

from collections.abc import Sequence

from fastres.nn.adapters.common import reference_steps, residual_block
from fastres.nn.roles import NORMS, Window, declare_convolution, declare_pool, declare_shortcut
from fastres.nn.structure import register_block, register_network
from fastres.ops import Identity
from fastres.ops.layers import Pad
from fastres.reference.notebook import (
    NotebookBlock,
    NotebookResNet,
    SameConv2d,
    SameMaxPool2d,
    ShiftedBatchNorm2d,
    Subsample,
    same_padding,
)


def same_pad(hw: Sequence[int], kernel: Sequence[int], stride: int) -> Pad:
    """TensorFlow's 'SAME' on each side."""
    (top, bottom), (left, right) = (same_padding(size, k, stride) for size, k in zip(hw, kernel))
    return top, left, bottom, right


def same_window(pool: SameMaxPool2d, hw: tuple[int, int]) -> Window:
    """Of a max-pool with TensorFlow's 'SAME' padding."""
    return Window(pool.kernel, pool.stride, same_pad(hw, (pool.kernel, pool.kernel), pool.stride))


NORMS.add(ShiftedBatchNorm2d)
declare_convolution(SameConv2d, same_pad)
declare_pool(SameMaxPool2d, same_window)
declare_shortcut(Subsample, lambda shortcut: Identity(shortcut.stride))
register_block(NotebookBlock, residual_block)
register_network(NotebookResNet, reference_steps)
