"""Plain matrix products, as the model sees them: what stands for the library's convolutions.

A loop of wgmma (mma.sync on sm_80) fed from the shared memory by asynchronous copies, compiled by Triton, without
prologue, gather or statistics. The best of several tiles, 128 x 256 among them, stands for a well-tuned library
(CUTLASS, cuDNN at its best); tiles of 128 x 128 alone for a plain Triton kernel.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from bench.launches import Specialisation, recorded
from bench.machine.chips import LAUNCH, Chip
from bench.machine.predict import Prediction, launch_seconds
from bench.machine.program import Program, compiled
from bench.machine.work import Work, unrolled


@triton.jit
def product_kernel(  # type: ignore[no-untyped-def]  # Triton would read the annotations
    a_ptr, b_ptr, c_ptr, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """``c = a b^T`` of a [M, K], b [N, K], c [M, N]. K is a multiple of BLOCK_K; rows past the end wrap."""
    tiles = tl.cdiv(N, BLOCK_N)
    m = tl.program_id(0) // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a = a_ptr + (m % M)[:, None] * K + k[None, :]
    b = b_ptr + (n % N)[None, :] * K + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, K, BLOCK_K):
        acc = tl.dot(tl.load(a), tl.load(b), acc)
        a += BLOCK_K
        b += BLOCK_K
    c = c_ptr + m[:, None] * N + n[None, :]
    tl.store(c, acc.to(c_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


class Tile(NamedTuple):
    """Of a plain product: rows, columns, depth of a step, warps, steps in flight."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


PLAIN = (Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 4, 3), Tile(64, 64, 64, 4, 3))
# Large tiles first: they read the L2 least, and a product that reaches its bound needs no further candidates.
TUNED = (Tile(128, 256, 64, 8, 3), Tile(256, 128, 64, 8, 3), *PLAIN, Tile(256, 64, 64, 8, 3))
CLOSE = 1.05  # of the least time there is: further tiles are not tried


@cache
def product_specialisation(tile: Tile) -> Specialisation:
    """The kernel for sizes that 16 divides."""
    a = torch.empty(64, 64, dtype=torch.bfloat16)
    blocks = dict(BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k)
    with recorded() as launches:
        product_kernel[(1,)](a, a, a, 64, 64, 64, **blocks, num_warps=tile.warps, num_stages=tile.stages)
    return launches[0].specialisation


@cache
def _program(tile: Tile, arch: int) -> Program | None:
    """None where the tile does not fit the architecture."""
    try:
        return compiled(product_specialisation(tile), arch)
    except Exception:  # whatever the compiler raises: it is no candidate
        return None


@cache
def product(rows: int, columns: int, depth: int, moved: int, tiles: tuple[Tile, ...], arch: int, chip: Chip,
            splits: int = 1) -> Prediction:  # fmt: skip
    """The quickest of the tiles for a product ``[rows, depth] x [depth, columns]``.

    Args:
        moved: bytes that come from the memory and go there.
        splits: parts of the depth that programs of their own sum.

    Raises:
        ValueError: where no tile fits.
    """
    best: Prediction | None = None
    done = 2 * rows * columns * depth
    least = max(moved / chip.bandwidth, done / chip.peak) + LAUNCH
    for tile in tiles:
        program = _program(tile, arch)
        # A tile that is twice as large as the product is never the quickest, and costs a simulation.
        if program is None or (tile.n >= 2 * max(columns, 64)) or (tile.m >= 2 * max(rows, 64)):
            continue
        trips = math.ceil(depth / splits / (tile.k * unrolled(program, product_specialisation(tile))))
        programs = math.ceil(rows / tile.m) * math.ceil(columns / tile.n) * splits
        try:
            one = launch_seconds(program, Work(programs, trips, moved, done), chip)
        except ValueError:  # does not fit
            continue
        if best is None or one.seconds < best.seconds:
            best = one
        if best.seconds <= CLOSE * least:
            break
    if best is None:
        raise ValueError(f"no tile for a product of {rows} x {columns} x {depth} on sm_{arch}")
    return best
