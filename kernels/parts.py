"""Sums over the parts of a weight gradient, alone or in a launch of other small work.

A part is what some programs of `fastres.kernels.wgrad` made of their pixels. Between two layers of a backward pass both
this sum and BatchNorm's coefficients are to be computed, neither of which fills a GPU, so that they share a launch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import triton
import triton.language as tl
from torch import Tensor

from fastres.kernels import buffers
from fastres.kernels.configs import FULL, PROGRAMS
from fastres.kernels.dependent import await_inputs
from fastres.kernels.geometry import cdiv, power_of_2
from fastres.kernels.launch import launch
from fastres.kernels.tiles import sum_pixels

USUAL = 16  # parts of a tile of weights that have programs enough
SECTOR = 8  # elements of a tile at least: what the memory moves at once
ELEMENTS = 16  # of a tile, for each thread
WARPS = 4


def sum_tile(parts: int, size: int, warps: int = WARPS) -> tuple[int, int]:
    """Parts and elements of a tile of `sum_parts` for weights of ``size``: few parts make it wide, small ones tall."""
    tile, most = ELEMENTS * 32 * warps, power_of_2(parts, 2, 1 << 30)
    rows = min(most, USUAL)
    while rows < most and tile // rows > SECTOR and cdiv(size, tile // rows) < FULL * PROGRAMS:
        rows *= 2
    return rows, tile // rows


@triton.jit
def sum_parts(parts_ptr, out_ptr, size, parts, program, PARTS: tl.constexpr, BLOCK: tl.constexpr, WARPS: tl.constexpr):
    """``out[i] = sum over p of parts[p, i]`` for the program's BLOCK of i. parts_ptr: [parts, size] fp32. Moves each
    once.

    A tile has many parts and few columns where that gives small weights programs enough: the sum waits for the memory,
    not for its rate.
    """
    i = program * BLOCK + tl.arange(0, BLOCK)
    ok = i < size
    total = tl.zeros((PARTS, BLOCK), tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        inside = (part < parts)[:, None] & ok[None, :]
        total += tl.load(parts_ptr + part[:, None] * size + i[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + i, sum_pixels(tl.trans(total), 32, WARPS), mask=ok)


@triton.jit(do_not_specialize=["parts"])
def sum_parts_kernel(parts_ptr, out_ptr, size, parts, PARTS: tl.constexpr, BLOCK: tl.constexpr, WARPS: tl.constexpr):
    """`sum_parts` alone."""
    await_inputs()
    sum_parts(parts_ptr, out_ptr, size, parts, tl.program_id(0), PARTS, BLOCK, WARPS)


Waiting = list[tuple[Tensor, Tensor]]
_waiting: ContextVar[Waiting | None] = ContextVar("waiting", default=None)


def total(parts: Tensor) -> Tensor:
    """The sum of parts [P, ...] fp32; inside `joining` it is computed by a later launch, at the latest by its end."""
    if parts.shape[0] == 1:
        return parts[0]
    out = buffers.empty(parts, *parts.shape[1:])
    listed = _waiting.get()
    if listed is None:
        _launch(parts, out)
    else:
        listed.append((parts, out))
    return out


def waiting() -> tuple[Tensor, Tensor] | tuple[None, None]:
    """The parts and the result of the sum that waits longest, for a launch that computes it; or None both."""
    listed = _waiting.get()
    return listed.pop(0) if listed else (None, None)


@contextmanager
def joining(joins: bool = True) -> Iterator[None]:
    """Inside, sums wait for launches that they can join; or, as outside, they are computed at once."""
    listed: Waiting = []
    token = _waiting.set(listed if joins else None)
    try:
        yield
    finally:
        _waiting.reset(token)
    for parts, out in listed:
        _launch(parts, out)


def _launch(parts: Tensor, out: Tensor) -> None:
    sizes = out.numel(), parts.shape[0]
    rows, block = sum_tile(parts.shape[0], out.numel())
    grid = (cdiv(out.numel(), block),)
    launch(sum_parts_kernel, grid, parts, out, *sizes, PARTS=rows, BLOCK=block, WARPS=WARPS, num_warps=WARPS)
