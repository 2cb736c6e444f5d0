"""A folded block over parts of a batch, each in one call of C++: what lies between their layers stays in the cache."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastres.kernels import buffers
from fastres.ops.backends.vendor import nchw, nhwc
from fastres.ops.cpu import tiles
from fastres.ops.cpu.packed import Own, PackedConv
from fastres.ops.cpu.program import Program, Unrecordable
from fastres.ops.cpu.tape import Tape

# What the widest activation of a part may take of the last-level cache. Smaller parts read the weights more often.
PART_BYTES = 12 * 2**20


class FoldedLayer(NamedTuple):
    """A folded convolution: what `PackedConv` is called with."""

    packed: PackedConv
    weight: Tensor
    bias: Tensor


class FoldedLayers(NamedTuple):
    """A folded block: convolutions in order, and what is added by the last one."""

    convs: tuple[FoldedLayer, ...]
    shortcut: FoldedLayer | None  # None: the block's input
    residual: bool


class _Part(NamedTuple):
    first: int
    last: int
    program: Program


class _Ready(NamedTuple):
    key: tuple
    own: list[Own]  # held, as the key has their identities
    parts: list[_Part]  # the largest first; none: the convolutions are to be called
    shape: tuple[int, ...]  # of the result, in NHWC


class PackedBlock:
    """A block with constant weights, ready for calls like the last one.

    What it is made of is the convolutions' own `PackedConv`, so that it is ready after one call of each. A copy starts
    empty, so that networks are copied and saved without. Threads may share it.
    """

    def __init__(self):
        self._ready: _Ready | None = None

    @property
    def is_ready(self) -> bool:
        """Whether there was a call that can be repeated."""
        return self._ready is not None and bool(self._ready.parts)

    @torch.no_grad()
    def repeat(self, x: Tensor, block: FoldedLayers) -> Tensor | None:
        """The block's result [N, C', H', W'], in channels-last memory; None where the convolutions are to be called.

        Args:
            x: [N, C, H, W] in channels-last memory.
        """
        inner = nhwc(x)
        if not inner.is_contiguous() or not tiles.takes(x.dtype):
            return None
        own = []
        for layer in block.convs if block.shortcut is None else (*block.convs, block.shortcut):
            if (found := layer.packed.own(layer.weight, layer.bias)) is None:
                return None
            own.append(found)
        structure = block.shortcut is None, block.residual
        key = inner.shape, torch.get_num_threads(), tiles.form(), structure, tuple(map(id, own))
        ready = self._ready  # looked up once: another thread may replace it
        if ready is None or ready.key != key:
            ready = self._ready = _prepared(key, inner, block, own)
        if not ready.parts:
            return None
        out, arena = buffers.empty(inner, *ready.shape), ready.parts[0].program.arena(inner)
        for first, last, program in ready.parts:
            program.run([inner[first:last]], [out[first:last]], arena)
        return nchw(out)

    def __deepcopy__(self, memo: dict) -> PackedBlock:
        return PackedBlock()

    def __reduce__(self) -> tuple:
        return PackedBlock, ()


def _prepared(key: tuple, x: Tensor, block: FoldedLayers, own: list[Own]) -> _Ready:
    images = len(x)
    count = -(-images // max(1, PART_BYTES // max(x[0].nbytes, *(one.output_bytes for one in own))))
    ranges = [(images * part // count, images * (part + 1) // count) for part in range(count)]
    ranges.sort(key=lambda part: part[0] - part[1])
    programs, shape = {}, None
    try:
        for first, last in ranges:
            if last - first not in programs:
                programs[last - first], shape = _program(x[first:last], block, own)
    except Unrecordable:
        return _Ready(key, own, [], ())
    assert shape is not None
    return _Ready(key, own, [_Part(*part, programs[part[1] - part[0]]) for part in ranges], (images, *shape[1:]))


def _program(x: Tensor, block: FoldedLayers, own: list[Own]) -> tuple[Program, tuple[int, ...]]:
    """Of a part, and its result's shape."""
    with Tape([x]) as tape:
        out = _walk(x, block, own)
    return Program(tape, [out], [x]), tuple(out.shape)


def _walk(x: Tensor, block: FoldedLayers, own: list[Own]) -> Tensor:
    *convs, last = own[: len(block.convs)]
    y, added, out = x, None, None
    for conv in convs:
        y = conv(y)
    if block.residual:
        added = x if block.shortcut is None else own[-1](x)
        out = None if block.shortcut is None else added  # the sum is written where a projection is read
    return last(y, added, out)
