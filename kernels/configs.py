"""Tile configurations of the convolution kernels, chosen from plain tables by shape and dtype.

Entries are compiled ahead of time for sm_80, 86, 89, 90, 100, 120 and gfx942 (``bench/aot.py``). None may spill, but
for a few bytes with which an H100 was quickest: 128x128 tiles with 4 warps do. Where there is less shared memory those
are passed over that do not fit (`fastres.kernels.resources`).
`triton.autotune` is left out on purpose: it needs a GPU to import under, and times inside the first step of training.
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
FULL = 0.9  # share of the multiprocessors that have work all along
OTHER = 0  # an architecture that is not NVIDIA's
REGISTERS, LANES = 65536, 32  # of a multiprocessor, of a warp: NVIDIA's since sm_50
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
    taps: int = 1  # of a window, whose weight gradients one program sums: it has a tile of each

    @property
    def launch(self) -> dict[str, int]:
        """The launch's keyword arguments."""
        return dict(
            BLOCK_M=self.block_m,
            BLOCK_N=self.block_n,
            BLOCK_K=self.block_k,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
            **limited(self.most_registers),
        )


def limited(registers: int) -> dict[str, int]:
    """The keyword arguments that limit a launch's registers a thread; AMD's compiler knows none."""
    return {} if torch.version.hip else dict(maxnreg=registers)


def has_warp_groups(arch: int) -> bool:
    """Whether an architecture multiplies by wgmma, from the shared memory; others' operands are registers."""
    return arch == 90


def has_mma(arch: int) -> bool:
    """Whether an architecture multiplies by mma.sync, from registers."""
    return arch in (80, 86, 89, 120)


def has_tensor_cores(arch: int) -> bool:
    """Whether Triton multiplies matrices by tensor cores: on Turing (sm_75) it does not, though the GPU has some."""
    return arch == OTHER or arch >= 80


class Product(NamedTuple):
    """A convolution's product or its input gradient's, as far as its tiles depend on it."""

    rows: int  # pixels of the result
    columns: int  # its channels
    depth: int  # channels summed over, of one tap
    dtype: torch.dtype  # of the operands
    arch: int = 90  # compute capability
    taps: int = 1  # that a pixel of the result has
    loaded: int = 1  # tensors that the operand of pixels is made of
    made: bool = False  # whether that operand is computed, not loaded as it is
    flat: bool = False  # whether its columns are gathered one by one, from all taps in a row
    least_registers: int = 0  # a thread's limit is no lower
    stores: bool = False  # whether that operand is stored, too
    strided: bool = False  # whether the result has a strided residual added to it
    sums: bool = False  # whether the result goes through an activation and is summed for a BatchNorm
    masked: bool = False  # moreover by the end of a block, which is loaded
    keeps: bool = False  # whether that activation is stored
    step: int = 1  # stride of the convolution whose gradient it is
    dilated: bool = False  # whether that has a dilation


# By the model (`bench.machine`): wgmmas of 256 columns read a sixth less of the shared memory than those of 128.
LARGE = Config(256, 128, 64, 8, 3, 255)
# Where steps of 64 channels would be half empty: of 24 or 96 of them (`speed95`).
SHALLOW = Config(256, 128, 32, 8, 4, 255)


def conv_configs(product: Product) -> list[Config]:
    """Configurations of a convolution, the one to take first: on an H100 as they were timed."""
    if not _on_warp_groups(product):
        return _ordered(_mma_convs(product) + _plain_configs(product), product)
    if product.flat:  # bound by its addresses: many small programs
        return _ordered([Config(64, 64, 64, 4, 3, 255), *_plain_configs(product)], product)
    halves = product.taps > 1 and _halves_steps(product)
    if product.taps == 1 and product.loaded == 2:  # bound by memory: many small programs
        sizes = [(128, 64), (128, 128), (64, 64)]
    elif product.taps == 1 and product.depth <= 64:
        sizes = [(128, 128), (128, 64), (64, 64)]
    elif halves:
        sizes = [(256, 128), (128, 64), (64, 64)]
    elif product.taps > 1 and product.depth <= 32:  # bound by the addresses; 128x128 would spill 16 bytes
        sizes = [(128, 64), (64, 64)]
    elif product.columns >= 256 and product.taps > 1:  # bound by the L2 and the shared memory: few large programs
        sizes = [(256, 128), (128, 128), (128, 256), (128, 64)]
    elif product.columns >= 256 and product.made and product.depth >= 512:  # likewise
        sizes = [(128, 256), (128, 128), (128, 64)]
    elif product.taps > 1:
        sizes = [(128, 128), (256, 128), (128, 64), (64, 64)]
    else:
        sizes = [(128, 128), (128, 64), (64, 64)]
    uneven = (
        product.columns.bit_count() > 1 and not halves
    )  # 96, 192 or 384 channels: others would spill up to 104 bytes
    if uneven:
        square_too = product.taps > 1 and product.columns % 64 == 0 and not product.made
        sizes = [one for one in sizes if one[1] <= 64 or (one == (128, 128) and square_too)]
    # Of 384 channels Triton 3.6 would spill with 128 registers.
    square = Config(128, 128, 64, 8, 3, 255 if product.loaded == 2 or (uneven and product.columns > 256) else 128)
    of_size = {
        (256, 128): SHALLOW if halves else LARGE,
        (128, 256): Config(128, 256, 64, 16, 3, 128),
        (128, 128): square,
        (128, 64): Config(128, 64, 64, 8, 3, 128),
        (64, 64): Config(64, 64, 64, 8, 3, 168),
    }
    return _ordered([of_size[size] for size in sizes], product)


def dgrad_configs(product: Product) -> list[Config]:
    """Configurations of an input gradient, the one to take first: on an H100 as they were timed."""
    if not _on_warp_groups(product) or (product.loaded == 1 and product.made):
        plain = product
        if product.keeps and product.columns > 64:  # 16 bytes would spill with 168
            plain = product._replace(least_registers=255)
        found = _mma_gradients(product)
        found = _ordered(found, product) + _plain_configs(plain) if found else _plain_configs(plain)
        if has_warp_groups(product.arch) and product.dtype.itemsize == 2 and product.loaded == 1 and product.taps > 1:
            found = _ordered([Config(128, 32, 64, 4, 3, 168), *found], product) if product.columns > LEAST else found
        return found
    columns, deep = product.columns, product.depth > 64
    if product.taps > 1 or product.loaded == 1:
        found = _window_gradients(product)
    elif columns <= 64:
        found = [Config(128, 64, 64, 8, 3, 128), Config(64, 64, 64, 4, 3, 128)]
    elif product.masked:  # its end waits for three more tensors: programs of few registers, side by side
        found = [Config(128, 64, 64, 4, 3, 168), Config(64, 64, 64, 4, 3, 128)]
        if deep:
            found[:1] = [Config(64, 128, 32, 4, 4, 168), Config(128, 64, 32, 4, 4, 168)]
    elif not deep:
        found = [Config(128, 128, 64, 8, 3, 128), Config(64, 64, 64, 4, 3, 128)]
    elif columns <= 128:
        found = [Config(128, 64, 64, 8, 3, 128), Config(64, 64, 64, 4, 3, 128), Config(128, 128, 32, 8, 4, 128)]
        found = found if product.sums else found[::-1]
    elif product.sums:
        found = [Config(128, 256, 64, 16, 3, 128), Config(256, 128, 64, 16, 3, 128), Config(64, 128, 64, 4, 3, 168)]
    else:
        found = [Config(64, 256, 32, 8, 4, 128), Config(128, 256, 64, 16, 3, 128), Config(128, 128, 32, 8, 4, 128)]
        found = found if product.depth < 256 else [found[1], found[0], found[2]]
    return _ordered(found, product)


def _window_gradients(product: Product) -> list[Config]:
    """Of `dgrad_configs`: windows, and what reads a gradient that is there."""
    narrow = Config(128, 64, 64, 4, 3, 168)  # three programs of few registers run at once
    small = Config(64, 64, 64, 4, 3, 128)
    square = Config(128, 128, 64, 8, 3, 128)
    if product.loaded == 2:  # both tensors in shallow steps, so that two programs have room
        found = [Config(128, 128, 32, 8, 3, 128), Config(128, 64, 32, 8, 4, 128), small]
        if product.stores:  # Triton 3.6 would spill 8 bytes, in large tiles and with 128 registers
            found = [found[1], small._replace(most_registers=MORE_REGISTERS)]
        return [Config(128, 64, 64, 8, 3, 128), *found[-1:]] if product.columns <= 64 else found
    if _halves_steps(product) and not product.sums:
        return [SHALLOW, square, small]
    if product.least_registers:  # behind GELU
        return [square, Config(64, 128, 64, 4, 3, 168)] if product.columns > 64 else [small]
    if product.columns <= 64:
        return [narrow, small, square]
    if product.columns <= 128 or product.step > 1:
        return [square, LARGE, narrow, small]
    return [LARGE, square, narrow] if product.sums else [square, LARGE, narrow]


def _halves_steps(product: Product) -> bool:
    """Whether a step of 64 channels of a tap would be half empty, and tiles of 128 channels would not."""
    return product.columns > 64 and 0 < product.depth % 64 <= 32


# Programs that run side by side by the model (`bench.machine`), on architectures that multiply by mma.sync: three, two
# and two. An A100 and a GeForce would take a quarter and a tenth less for the convolutions of ResNet-18 than in the
# tiles of `_plain_configs`, of which they run one program or two.
LIGHT, SQUARE = Config(128, 64, 32, 4, 3, 168), Config(128, 128, 32, 8, 3, 128)
ROOMY = LIGHT._replace(most_registers=255)  # where LIGHT would spill


def _takes_mma(product: Product) -> bool:
    return has_mma(product.arch) and product.dtype.itemsize == 2 and product.columns > 32 and not product.flat


def _mma_convs(product: Product) -> list[Config]:
    """Of `conv_configs`."""
    if not _takes_mma(product):
        return []
    if product.loaded == 2:
        return [ROOMY] if product.arch == 80 else []
    return [LIGHT, SQUARE] if product.made or product.columns <= 64 else [SQUARE, LIGHT]


def _mma_gradients(product: Product) -> list[Config]:
    """Of `dgrad_configs`."""
    if not _takes_mma(product):
        return []
    if product.made and product.taps > 1 or product.sums and product.least_registers:  # behind GELU
        return []
    if product.made or product.sums:
        spills = product.columns > 256 or product.dilated or product.strided
        spills = spills or (product.made and (product.masked or product.depth > 512))
        return [LIGHT if product.arch == 80 and product.sums and not spills else ROOMY]
    return [SQUARE, LIGHT] if product.columns > 64 and product.step == 1 else [LIGHT]


def _on_warp_groups(product: Product) -> bool:
    return has_warp_groups(product.arch) and product.dtype.itemsize == 2 and product.columns > 32


def _plain_configs(product: Product) -> list[Config]:
    block_n = power_of_2(product.columns, LEAST, 128 if product.dtype.itemsize == 2 else 64)
    tiles = _distinct([(128, block_n), (128, min(block_n, 64)), (64, min(block_n, 64))], product.dtype, product.arch)
    least = MORE_REGISTERS if product.made or product.flat else 0
    if product.loaded == 2:
        least = 255
    depth = min(product.depth, 32) if product.flat else product.depth
    found = [_config(*tile, depth, product.dtype, least, product.arch) for tile in tiles]
    # With 255 registers Triton 3.6 would spill 16 bytes on sm_80 and 3.8 those of one tensor, 24 bytes, on sm_120.
    spills = product.stores and (product.strided if product.loaded == 2 else not has_warp_groups(product.arch))
    if spills and product.dtype.itemsize == 2:
        shallow = dict(block_k=min(found[0].block_k, 32), num_stages=4)
        found = [one._replace(**shallow) if one.block_m == one.block_n == 128 else one for one in found]
    return _ordered(found, product)


def _ordered(configs: list[Config], product: Product) -> list[Config]:
    """The first that fills a large GPU, or else the smallest, then the others; none exceeds the channels by half."""
    widest, deepest = power_of_2(product.columns, LEAST, 256), power_of_2(product.depth, LEAST, 64)
    configs = [
        one._replace(block_k=min(one.block_k, deepest), most_registers=max(one.most_registers, product.least_registers))
        for one in configs
        if one.block_n <= widest
    ]

    def fills(one: Config) -> bool:
        programs = cdiv(product.rows, one.block_m) * cdiv(product.columns, one.block_n)
        if one.block_m * one.block_n > 128 * 128:  # one runs at a time: the last ones are to leave few idle
            if one.num_stages == SHALLOW.num_stages:  # that one alone: the others' steps are half empty
                return programs >= 2 * PROGRAMS
            return programs >= FULL * cdiv(programs, PROGRAMS) * PROGRAMS
        return programs >= FULL * PROGRAMS

    full = [one for one in configs if fills(one)]
    first = full[0] if full else configs[-1]
    return sorted(dict.fromkeys(configs), key=lambda one: one != first)


def wgrad_configs(
    rows: int,
    columns: int,
    pixels: int,
    dtype: torch.dtype,
    least_registers: int = 0,
    arch: int = 90,
    made: bool = True,
    flat: bool = False,
    window: tuple[int, int] = (1, 1),
    reads_made: bool = False,
) -> list[Config]:
    """Configurations of a weight gradient, the one to take first.

    Args:
        rows: channels of the convolution's result.
        columns: channels of a tap, or taps times channels.
        pixels: summed over.
        dtype: of the operands.
        least_registers: a thread's limit is no lower.
        arch: compute capability, as 90.
        made: whether the gradient is computed here, not loaded as it is.
        flat: whether the columns are gathered one by one, from all taps in a row.
        window: its rows and columns of taps.
        reads_made: whether what the convolution read is computed here, too.
    """
    block_m, block_n = power_of_2(rows, LEAST, 128), power_of_2(columns, LEAST, 128)
    tiles = _distinct([(block_m, block_n), (min(block_m, 64), min(block_n, 64))], dtype, arch)
    configs = [_config(*tile, pixels, dtype, least_registers, arch) for tile in tiles]
    if (
        flat
    ):  # with 168 registers one program of eight warps runs at a time, too, and Triton 3.6 spills 8 bytes on sm_100
        configs = [one._replace(most_registers=255) if one.num_warps == 8 else one for one in configs]
    if has_mma(arch) and dtype.itemsize == 2 and not flat and min(block_m, block_n) >= 64:
        light = ROOMY if made and arch != 80 else LIGHT
        configs = [light._replace(block_m=block_m, block_n=64), *configs]
    if has_warp_groups(arch) and dtype.itemsize == 2 and flat and block_m >= 64:
        configs = [Config(64, 64, 32, 4, 4, MORE_REGISTERS), *configs]
    elif has_warp_groups(arch) and dtype.itemsize == 2:
        several = window != (1, 1)
        configs = _ranked_weight_gradients(rows, columns, made, several, reads_made) + configs
        if window[1] == TAPS and (made or not reads_made):
            rowwise = _rowwise_weight_gradients(rows, columns, made)
            # Their programs have three tiles each, so that a GPU is full of more parts, which are stored and loaded: of
            # many channels that takes what is gained, unless fewer programs left multiprocessors idle.
            place = 0 if columns <= 64 or min(rows, columns) >= 512 else 1
            configs[place:place] = [one for one in rowwise if _is_busy(one, rows, columns, pixels, window)]
        configs = [one._replace(most_registers=max(one.most_registers, least_registers)) for one in configs]
        configs = [one._replace(block_k=min(one.block_k, power_of_2(pixels, LEAST, 64))) for one in configs]
        configs = [one for one in configs if one.block_m <= 2 * block_m and one.block_n <= 2 * block_n]
    return configs


TAPS = 3  # of a row of a window, whose weight gradients one program sums


def _rowwise_weight_gradients(rows: int, columns: int, made: bool) -> list[Config]:
    """Those of `wgrad_configs` that sum a row of taps: dz is read, and the convolution's gradient made, once for all of
    them. The quickest by the model (`bench.machine`)."""
    if made:
        most = max(rows, columns)
        small = Config(16, 16, 64, 4, 3, 255, TAPS) if most <= 16 else Config(32, 32, 32, 4, 3, 168, TAPS)
        return [small] if most <= 32 else []
    if min(rows, columns) <= 32:
        return []
    if columns <= 64:
        return [Config(64, 64, 64, 4, 3, 168, TAPS)]
    return [Config(128, 128, 64, 8, 3, 255, TAPS)]


def _is_busy(config: Config, rows: int, columns: int, pixels: int, window: tuple[int, int]) -> bool:
    """Whether a weight gradient's programs are enough for half of a large GPU."""
    programs = weight_programs(config, rows, columns, window)
    return programs * splits(programs, pixels, config, 0) >= PROGRAMS // 2


def weight_programs(config: Config, rows: int, columns: int, window: tuple[int, int]) -> int:
    """Programs of each part of a weight gradient: one for each tile of channels and `Config.taps` of the window."""
    return cdiv(rows, config.block_m) * cdiv(columns, config.block_n) * (window[0] * window[1] // config.taps)


def grads_configs(
    cin: int, cout: int, dtype: torch.dtype, arch: int = 90, sums: bool = True, masked: bool = False
) -> list[Config]:
    """Configurations of both gradients of a pointwise convolution in one kernel, the one to take first by the model
    (`bench.machine`); none where a program could not hold its channels of dw and w.

    BLOCK_M pixels a step, BLOCK_N of the CIN channels, all COUT channels in BLOCK_K: dw takes BLOCK_N * BLOCK_K
    accumulators, a quarter or half of a multiprocessor's registers.

    Args:
        cin, cout: channels of the convolution.
        dtype: of the operands.
        arch: compute capability, as 90.
        sums: whether the gradient goes through a ReLU and is summed for a BatchNorm.
        masked: moreover whether that ReLU is the end of a block, which is loaded.
    """
    if dtype.itemsize != 2 or min(cin, cout) < LEAST or cout > 256:
        return []
    block_k, block_n = power_of_2(cout, 64, 256), power_of_2(cin, 64, 128)
    if block_k == 256 and cin > 128:  # dz and y would be read too often: an H100 took 437 us where two kernels take 366
        return []
    if arch == 80 and block_k == 64:  # on others without warp groups two kernels take less
        return [Config(32, 64, block_k, 4, 3, 255)]
    if not has_warp_groups(arch):
        return []
    if block_k == 256:  # 32 pixels of 128 channels behind the end of a block would spill
        if not sums and block_n == 128:
            return [Config(32, 128, block_k, 8, 3, 255)]
        few = Config(32, 64, block_k, 8, 4, 255)
        return [Config(16, 128, block_k, 8, 4, 255), few] if masked and block_n == 128 else [few]
    found = [Config(32, block_n, block_k, 8, 4, 255), Config(32, block_n, block_k, 8, 3, 255)]
    if 128 < cin <= 256 and block_k == 64:  # reads whole pixels, where others read a part of their channels
        found.insert(1, Config(16, 256, block_k, 8, 4, 255))
    return found


def resident_configs(product: Product) -> list[Config]:
    """Configurations of a pointwise convolution whose weights stay, the one to take first by the model; none where a
    program could not hold its channels of them, and without warp groups, where small tiles take less.

    BLOCK_M pixels a step, BLOCK_N channels of the result, all that are read in BLOCK_K.
    """
    plain = (product.taps, product.loaded, product.flat, product.least_registers) == (1, 1, False, 0)
    few = product.depth < LEAST or product.columns <= 32
    if not plain or few or product.depth > 256 or product.dtype.itemsize != 2:
        return []
    block_k, block_n = power_of_2(product.depth, LEAST, 256), power_of_2(product.columns, 64, 128)
    if not has_warp_groups(product.arch):
        return []
    if block_k <= 128:  # three programs side by side
        return [Config(32, block_n, block_k, 4, 4, 168)]
    return [Config(64, block_n, block_k, 8, 3, 255)]


LEAST_STEPS_HELD, MOST_STEPS_HELD = 8, 512  # of a program that keeps its weights


def steps_of(pixels: int, groups: int, config: Config, at_once: int = 1) -> int:
    """Steps of BLOCK_M pixels of a program that keeps its weights: with ``groups`` for the channels the programs fill a
    GPU once.

    No fewer than `LEAST_STEPS_HELD`, since each begins with the weights and ends with its sums, no more than
    `MOST_STEPS_HELD`: it adds them up one after another, and its offsets fit 32 bits.

    Args:
        at_once: programs of a multiprocessor.
    """
    steps = cdiv(pixels, config.block_m * max(1, at_once * PROGRAMS // groups))
    return min(max(steps, LEAST_STEPS_HELD), MOST_STEPS_HELD)


def programs_at_once(config: Config) -> int:
    """Programs of a multiprocessor, by their registers."""
    return max(1, REGISTERS // (config.most_registers * LANES * config.num_warps))


def _ranked_weight_gradients(rows: int, columns: int, made: bool, window: bool, reads_made: bool) -> list[Config]:
    """Those of `wgrad_configs` that were quickest on an H100, where it was timed."""
    tall, wide = Config(256, 128, 64, 8, 3, 255), Config(128, 256, 64, 8, 3, 255)
    lean, narrow = Config(128, 128, 64, 8, 3, 128), Config(128, 64, 64, 8, 3, 128)
    small = Config(64, 64, 64, 4, 4, 168)
    if made:
        return [wide] if rows >= 256 and columns >= 256 else [small] if columns <= 64 else []
    if rows <= 32 or columns <= 32:
        return [Config(64, 32, 64, 4, 4, 128)] if rows >= 64 else []
    if rows <= 64 and columns <= 64:
        return [small]
    if columns <= 64 or (min(rows, columns) <= 128 and not window):
        return [narrow, lean] if columns > 64 else [narrow]
    if rows >= 256 and not reads_made:
        return [tall, wide, lean] if window else [wide, lean]
    return [lean, narrow]


def _distinct(tiles: list[tuple[int, int]], dtype: torch.dtype, arch: int) -> list[tuple[int, int]]:
    """The tiles, largest first, each once; without tensor cores the smallest alone, as others spill."""
    tiles = list(dict.fromkeys(tiles))
    return tiles[-1:] if _is_without_tensor_cores(dtype, arch) else tiles


def _is_without_tensor_cores(dtype: torch.dtype, arch: int) -> bool:
    return precision(dtype) == "ieee" or not has_tensor_cores(arch)


def _config(block_m: int, block_n: int, depth: int, dtype: torch.dtype, least_registers: int, arch: int) -> Config:
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
    if _is_without_tensor_cores(dtype, arch):
        block_k, num_stages, registers = 16, 3, 255
    elif dtype.itemsize == 4:  # twice the shared memory for an element, and its registers
        block_k, num_stages, registers = 32, 3, 255
    registers = max(registers, least_registers)
    if arch == OTHER:  # whose warps have twice the threads; deeper steps spill, with Triton 3.6 up to 340 bytes
        block_k, num_warps = min(block_k, 32), num_warps // 2
    return Config(block_m, block_n, power_of_2(depth, LEAST, block_k), num_warps, num_stages, registers)


def at_rank(configs: list[Config], rank: int, fits: Callable[[Config], bool] = lambda config: True) -> Config:
    """The configuration of that rank, or the last one; if it does not fit, the next that does, behind the last the
    first.

    Where none fits it is that of the rank: its launch tells what is missing.
    """
    rank = min(rank, len(configs) - 1)
    config = next((one for one in configs[rank:] + configs[:rank] if fits(one)), configs[rank])
    note(config)
    return config


def note(what: Config | str) -> None:
    """List something that tells one way of computing from another, see `taken`."""
    for listed in _listening.get():
        listed.append(what)


def withdraw(config: Config) -> None:
    """Strike out the configuration that `taken` listed last: its launch was refused."""
    for listed in _listening.get():
        assert listed.pop() == config


_listening: ContextVar[tuple[list[Config | str], ...]] = ContextVar("listening", default=())


@contextmanager
def taken() -> Iterator[list[Config | str]]:
    """The configurations that launchers take inside, and what else is noted, in order: what tells a candidate from
    another one that does the same."""
    listed: list[Config | str] = []
    token = _listening.set((*_listening.get(), listed))
    try:
        yield listed
    finally:
        _listening.reset(token)


# Programs of a multiprocessor that a weight gradient is shared among: two hide one another's waits, so that what their
# parts move is well spent; two more are worth it where `light_parts` says so, and further ones never.
GAINFUL, MOST = 2, 4
# A part is at least so many steps long for each program that runs beside it, up to GAINFUL: filling the pipeline and
# storing the accumulators costs a program about one step.
LEAST_STEPS = 8


def splits(programs: int, pixels: int, config: Config, light: int) -> int:
    """Parts of a sum over pixels: what fits a GPU at once, as each costs a copy of the result, none of few steps.

    Args:
        light: parts that weigh little, see `light_parts`.
    """
    at_once = min(MOST, programs_at_once(config))
    parts = at_once * PROGRAMS // programs
    if at_once > GAINFUL:
        parts = min(parts, max(GAINFUL * PROGRAMS // programs, light))
    return max(1, min(parts, pixels // (LEAST_STEPS * min(at_once, GAINFUL) * config.block_k)))


# The product waits for the memory where it is small enough to have more than GAINFUL programs at once. Parts that move
# an eighth of what the product reads slow it by an eighth at most, less than the programs that they keep busy gain.
PARTS_SHARE = 8
PART_TRIPS = 2  # a part is stored, and loaded for the sum
PART_BYTES = 4  # of an element: fp32


def light_parts(read: int, weights: int) -> int:
    """Parts of a weight gradient of ``weights`` elements that move 1 / PARTS_SHARE of ``read`` bytes."""
    return read // (PARTS_SHARE * PART_TRIPS * PART_BYTES * weights)


def precision(dtype: torch.dtype) -> str:
    """``tl.dot``'s input precision: tf32 for fp32 operands where PyTorch's own switch for convolutions allows it."""
    if dtype != torch.float32:
        return "tf32"  # says nothing to operands of 16 bits; one value, so that it makes no second kernel
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"  # type: ignore[attr-defined]
