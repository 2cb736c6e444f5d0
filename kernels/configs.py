"""Tile configurations of the convolution kernels, chosen from plain tables by shape and dtype.

Every entry compiles for sm_80, sm_90 and sm_100 without a spill (``bench/aot.py``): 128x128 tiles with 4 warps do not.
On sm_86, sm_89 and sm_120, which have less shared memory, those are passed over that do not fit
(`fastres.kernels.resources`). `triton.autotune` is left out on purpose: it needs a GPU to import under, and times
inside the first step of training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch

from fastres.kernels.geometry import cdiv, power_of_2

# Programs that fill a large GPU once (132 multiprocessors on an H100): with fewer, smaller tiles are taken.
PROGRAMS = 132
# Smallest side of a tile that tl.dot takes.
LEAST = 16
# Registers a thread of kernels that spill a few with 128, with Triton 3.6 and not with 3.8: the weight gradient of a
# convolution of few channels, which computes a pixel's place for each column (104 bytes for the 7x7 stem on sm_80),
# that of a window wider than a pixel that makes both its operands (8 bytes in tiles of 128x64 and 64x128 on sm_80,
# dilated or not), and the strided data gradient behind a BatchNorm whose statistics are constants (8 bytes). They need
# 161 at most.
MORE_REGISTERS = 168


class Config(NamedTuple):
    """Tile of a matrix product [M, K] x [K, N], warps a program, depth of the software pipeline, registers a thread."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    most_registers: int

    @property
    def launch(self) -> dict[str, int]:
        """The launch's keyword arguments."""
        return dict(
            BLOCK_M=self.block_m,
            BLOCK_N=self.block_n,
            BLOCK_K=self.block_k,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
            maxnreg=self.most_registers,
        )


def conv_configs(rows: int, columns: int, depth: int, dtype: torch.dtype, least_registers: int = 0) -> list[Config]:
    """Configurations of a convolution's product, the one to take first.

    Args:
        rows: pixels of the result.
        columns: its channels.
        depth: channels summed over, of one tap.
        dtype: of the operands.
        least_registers: a thread's limit is no lower.
    """
    block_n = power_of_2(columns, LEAST, 128 if dtype.itemsize == 2 else 64)
    tiles = _distinct([(128, block_n), (128, min(block_n, 64)), (64, min(block_n, 64))], dtype)
    full = [tile for tile in tiles if cdiv(rows, tile[0]) * cdiv(columns, tile[1]) >= PROGRAMS]
    first = full[0] if full else tiles[-1]
    return [_config(*tile, depth, dtype, least_registers) for tile in sorted(tiles, key=lambda tile: tile != first)]


def wgrad_configs(rows: int, columns: int, pixels: int, dtype: torch.dtype, least_registers: int = 0) -> list[Config]:
    """Configurations of a weight gradient, the one to take first.

    Args:
        rows: channels of the convolution's result.
        columns: channels of a tap, or taps times channels.
        pixels: summed over.
        dtype: of the operands.
        least_registers: a thread's limit is no lower.
    """
    block_m, block_n = power_of_2(rows, LEAST, 128), power_of_2(columns, LEAST, 128)
    tiles = _distinct([(block_m, block_n), (min(block_m, 64), min(block_n, 64))], dtype)
    return [_config(*tile, pixels, dtype, least_registers) for tile in tiles]


def _distinct(tiles: list[tuple[int, int]], dtype: torch.dtype) -> list[tuple[int, int]]:
    """The tiles, largest first, each once; for fp32 without tensor cores the smallest alone, as others spill."""
    tiles = list(dict.fromkeys(tiles))
    return tiles[-1:] if precision(dtype) == "ieee" else tiles


def _config(block_m: int, block_n: int, depth: int, dtype: torch.dtype, least_registers: int) -> Config:
    """The tile with the step, warps and stages at which it neither spills nor outgrows an A100's shared memory.

    Told no limit of registers, the assembler aims low and spills a few bytes for it; told one, it does not. With up to
    128 registers a multiprocessor runs two programs of 8 warps.
    """
    if block_m == block_n == 128:
        block_k, num_warps, num_stages, registers = 64, 8, 3, 255
    elif block_m == block_n == 64:
        block_k, num_warps, num_stages, registers = 64, 8, 3, 168
    elif block_m * block_n > 64 * 64:
        block_k, num_warps, num_stages, registers = 32, 8, 4, 128
    else:
        block_k, num_warps, num_stages, registers = 32, 4, 3, 255
    if dtype.itemsize == 4:  # twice the shared memory for an element, and its registers
        block_k, num_stages, registers = 16 if precision(dtype) == "ieee" else 32, 3, 255
    registers = max(registers, least_registers)
    return Config(block_m, block_n, power_of_2(depth, LEAST, block_k), num_warps, num_stages, registers)


def at_rank(configs: list[Config], rank: int, fits: Callable[[Config], bool] = lambda config: True) -> Config:
    """The configuration of that rank, or the last one; if it does not fit, the next that does, behind the last the
    first.

    Where none fits it is that of the rank: its launch tells what is missing.
    """
    rank = min(rank, len(configs) - 1)
    config = next((one for one in configs[rank:] + configs[:rank] if fits(one)), configs[rank])
    for listed in _listening.get():
        listed.append(config)
    return config


def withdraw(config: Config) -> None:
    """Strike out the configuration that `taken` listed last: its launch was refused."""
    for listed in _listening.get():
        assert listed.pop() == config


_listening: ContextVar[tuple[list[Config], ...]] = ContextVar("listening", default=())


@contextmanager
def taken() -> Iterator[list[Config]]:
    """The configurations that launchers take inside, in order: what tells a rank from another one repeated."""
    listed: list[Config] = []
    token = _listening.set((*_listening.get(), listed))
    try:
        yield listed
    finally:
        _listening.reset(token)


def splits(programs: int, pixels: int, block_k: int) -> int:
    """Parts of a sum over pixels: what fits a GPU at once, as each costs a copy of the result, none below 8 steps."""
    return max(1, min(PROGRAMS // programs, pixels // (8 * block_k)))


def precision(dtype: torch.dtype) -> str:
    """``tl.dot``'s input precision: tf32 for fp32 operands where PyTorch's own switch for convolutions allows it."""
    if dtype != torch.float32:
        return "tf32"  # says nothing to operands of 16 bits; one value, so that it makes no second kernel
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"  # type: ignore[attr-defined]
