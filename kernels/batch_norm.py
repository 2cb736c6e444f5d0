"""BatchNorm's per-channel arithmetic: statistics of a tensor, coefficients of both directions, running statistics.

Partial results of row tiles [T, C] are merged in a fixed order, so the same input gives the same bits, by compensated
sums (Knuth's two-sum), which lose no more than fp64 would where GPUs have little of that. One launch merges all tiles
of a layer; of more than `MOST_TILES` a launch of many programs before it leaves one partial result, in fp64, for every
512. In backward that launch also adds up the parts of the weight gradient that was computed last.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastres.kernels import buffers
from fastres.kernels.configs import has_warp_groups, limited
from fastres.kernels.dependent import await_inputs
from fastres.kernels.geometry import cdiv
from fastres.kernels.launch import launch
from fastres.kernels.parts import sum_parts, sum_tile, waiting
from fastres.kernels.resources import architecture
from fastres.kernels.row_tiles import WARPS, reduction
from fastres.kernels.tiles import MEAN, RSTD, SCALE, SHIFT, VAR, store_part_moments, sum_pixels, welford
from fastres.kernels.types import Moments

INFINITY = tl.constexpr(float("inf"))
# Trips of a loop over tiles whose loads are under way at once, on GPUs with wgmma: each waits for the memory. Where the
# assembler of others would spill for it, they go one by one.
IN_FLIGHT = 4
# Tiles more than which are merged by two launches.
MOST_TILES = 4096
# Channels of a program, and its warps, where there are only [C] vectors: 16 bytes a thread.
VECTOR, VECTOR_WARPS = 256, 2


@triton.jit(do_not_specialize=["M", "tiles"])
def moments_kernel(
    y_ptr,
    count_ptr,
    mean_ptr,
    m2_ptr,
    M,
    tiles,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Count, mean and M2 (sum of squared deviations) of each channel over this program's rows.

    `welford` down the tiles for each of the BLOCK_M rows, then a merge of the rows. Moves y once.

    Args:
        y_ptr: [M, C]. count_ptr, mean_ptr, m2_ptr: [T], [T, C], [T, C] fp32, a row a program.
        tiles: tiles of BLOCK_M rows that a program goes through.
    """
    await_inputs()
    part = tl.program_id(0)
    first = part.to(tl.int64) * (tiles * BLOCK_M)
    rows = tl.minimum(M - part * (tiles * BLOCK_M), tiles * BLOCK_M)
    row = tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_ok = channel < C
    offset = (row * C)[:, None] + channel[None, :]
    mean = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    y_ptr += first * C
    for tile in range(tiles):
        ok = (tile * BLOCK_M + row < rows)[:, None] & channel_ok[None, :]
        y = tl.load(y_ptr + tile * (BLOCK_M * C) + offset, mask=ok, other=0.0).to(tl.float32)
        mean, m2 = welford(y, ok, tile, mean, m2)
    writes = tl.program_id(1) == 0
    BITS: tl.constexpr = y_ptr.dtype.element_ty.primitive_bitwidth
    store_part_moments(
        tl.trans(mean), tl.trans(m2), rows, row, count_ptr, mean_ptr, m2_ptr, part, channel, channel_ok, C, writes,
        BITS, WARPS,
    )  # fmt: skip


def moments(y: Tensor) -> Moments:
    """Statistics of y [N, H, W, C] by tiles of its pixels: count [T], mean and M2 [T, C], fp32."""
    rows, channels = y.numel() // y.shape[3], y.shape[3]
    split = reduction(rows, channels, least_rows=256)
    made = buffers.moments(y, split.grid[0], channels)
    launch(moments_kernel, split.grid, y, *made, rows, split.tiles, C=channels, WARPS=WARPS, **split.launch)
    return made


class _Blocks(NamedTuple):
    """How a launch merges rows [tiles, columns]: each program some columns, block of rows after block."""

    rows: int
    columns: int
    warps: int
    most_registers: int  # of a thread: told none, the assembler aims low and spills

    @property
    def launch(self) -> dict[str, int]:
        """The launch's keyword arguments."""
        blocks = dict(BLOCK_T=self.rows, BLOCK_C=self.columns, WARPS=self.warps)
        return dict(**blocks, num_warps=self.warps, **limited(self.most_registers))


# Of 16 fp32 columns a row is two sectors of the memory; of 8 it is one, and there are twice the programs, each with as
# many loads in flight as it can have.
_FEW, _MANY = _Blocks(128, 16, 4, 255), _Blocks(512, 8, 16, 128)


def _blocks(tiles: int) -> _Blocks:
    return _FEW if tiles <= 4 * _FEW.rows else _MANY


def _in_flight(tensor: Tensor) -> int:
    return IN_FLIGHT if has_warp_groups(architecture(tensor.device)) else 1


@triton.jit
def two_sum(total, lost, value):
    """``total + value``, and ``lost`` with what the addition rounded away (Knuth 1969, theorem 4.2.2 B)."""
    added = total + value
    part = added - total
    return added, lost + ((total - (added - part)) + (value - part))


@triton.jit
def compensated(total, lost, WARPS: tl.constexpr):
    """The sums [C] over the rows of total + lost [T, C], fp64. What is not finite stays as a plain sum has it."""
    wide = total.to(tl.float64)
    wide = tl.where(tl.abs(lost) < INFINITY, wide + lost.to(tl.float64), wide)
    return sum_pixels(tl.trans(wide), total.dtype.primitive_bitwidth, WARPS)


@triton.jit
def chan_merge(
    count_ptr,
    mean_ptr,
    m2_ptr,
    T,
    channel,
    channel_ok,
    C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    WARPS: tl.constexpr,
    IN_FLIGHT: tl.constexpr,
):
    """Count, mean and M2 of T tiles together, fp64 (Chan et al. 1979): with deviations ``d_t = mean_t - mean_0`` it is
    ``mean = mean_0 + sum(n_t*d_t)/n, M2 = sum(M2_t + n_t*d_t^2) - sum(n_t*d_t)^2/n``.

    The first tile's mean is about as far from the mean as others are, so that little cancels. count [T]; mean, M2 [T,
    C]. Moves each once.
    """
    tile = tl.arange(0, BLOCK_T)
    offset = (tile * C)[:, None] + channel[None, :]
    origin = tl.load(mean_ptr + channel, mask=channel_ok, other=0.0)
    counts = tl.zeros((BLOCK_T,), tl.int64)
    weighted = tl.zeros((BLOCK_T, channel.shape[0]), mean_ptr.dtype.element_ty)
    weighted_lost = weighted
    squares = weighted
    squares_lost = weighted
    for start in tl.range(0, T, BLOCK_T, loop_unroll_factor=IN_FLIGHT):
        ok = start + tile < T
        inside = ok[:, None] & channel_ok[None, :]
        count = tl.load(count_ptr + start + tile, mask=ok, other=0.0)
        mean = tl.load(mean_ptr + start * C + offset, mask=inside, other=0.0)
        m2 = tl.load(m2_ptr + start * C + offset, mask=inside, other=0.0)
        counts += count.to(tl.int64)
        deviation = tl.where(inside, mean - origin[None, :], 0.0)
        term = count[:, None] * deviation
        weighted, weighted_lost = two_sum(weighted, weighted_lost, term)
        squares, squares_lost = two_sum(squares, squares_lost, m2 + term * deviation)
    total = tl.sum(counts, 0).to(tl.float64)
    shift = compensated(weighted, weighted_lost, WARPS)
    m2 = compensated(squares, squares_lost, WARPS) - shift * shift / total
    return total, origin.to(tl.float64) + shift / total, tl.where(m2 < 0.0, 0.0, m2)


@triton.jit(do_not_specialize=["T"])
def merge_kernel(
    count_ptr,
    mean_ptr,
    m2_ptr,
    merged_count_ptr,
    merged_mean_ptr,
    merged_m2_ptr,
    T,
    C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WARPS: tl.constexpr,
):
    """`chan_merge` of every BLOCK_T tiles: [T], [T, C], [T, C] to fp64 [S], [S, C], [S, C]. Moves all of them once."""
    await_inputs()
    part = tl.program_id(0)
    first = part.to(tl.int64) * BLOCK_T
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_ok = channel < C
    tiles = tl.minimum(T - part * BLOCK_T, BLOCK_T)
    total, mean, m2 = chan_merge(
        count_ptr + first, mean_ptr + first * C, m2_ptr + first * C, tiles, channel, channel_ok, C, BLOCK_T, WARPS, 1
    )
    tl.store(merged_mean_ptr + part * C + channel, mean, mask=channel_ok)
    tl.store(merged_m2_ptr + part * C + channel, m2, mask=channel_ok)
    if tl.program_id(1) == 0:
        tl.store(merged_count_ptr + part, total)


@triton.jit
def store_coef(mean, var, gamma_ptr, beta_ptr, eps, coef_ptr, channel, channel_ok, C: tl.constexpr):
    """``rstd = 1/sqrt(var + eps), scale = rstd*gamma, shift = beta - mean*scale`` in fp64, to coef [5, C]."""
    rstd = tl.rsqrt(var + eps)
    scale = rstd
    if gamma_ptr is not None:
        scale = rstd * tl.load(gamma_ptr + channel, mask=channel_ok, other=0.0).to(tl.float64)
    shift = -mean * scale
    if beta_ptr is not None:
        shift += tl.load(beta_ptr + channel, mask=channel_ok, other=0.0).to(tl.float64)
    tl.store(coef_ptr + MEAN * C + channel, mean.to(tl.float32), mask=channel_ok)
    tl.store(coef_ptr + VAR * C + channel, var.to(tl.float32), mask=channel_ok)
    tl.store(coef_ptr + RSTD * C + channel, rstd.to(tl.float32), mask=channel_ok)
    tl.store(coef_ptr + SCALE * C + channel, scale.to(tl.float32), mask=channel_ok)
    tl.store(coef_ptr + SHIFT * C + channel, shift.to(tl.float32), mask=channel_ok)


@triton.jit(do_not_specialize=["T"])
def finalize_kernel(
    count_ptr,
    mean_ptr,
    m2_ptr,
    gamma_ptr,
    beta_ptr,
    coef_ptr,
    T,
    eps,
    C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WARPS: tl.constexpr,
    IN_FLIGHT: tl.constexpr,
):
    """Coefficients of the T tiles' common mean and biased variance, `chan_merge` and `store_coef`.

    Args:
        count_ptr, mean_ptr, m2_ptr: [T], [T, C], [T, C], fp32 or fp64. gamma_ptr, beta_ptr: [C] or None: 1 and 0.
        coef_ptr: [5, C] fp32.
    """
    await_inputs()
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_ok = channel < C
    total, mean, m2 = chan_merge(count_ptr, mean_ptr, m2_ptr, T, channel, channel_ok, C, BLOCK_T, WARPS, IN_FLIGHT)
    store_coef(mean, m2 / total, gamma_ptr, beta_ptr, eps, coef_ptr, channel, channel_ok, C)


def finalize(moments: Moments, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
    """Merge the tiles (Chan et al. 1979) in fp64; coefficients [5, C] fp32: mean, biased variance, rstd, scale, shift.

    Args:
        moments: count [T], mean and M2 [T, C], fp32.
        gamma, beta: [C], any floating dtype; None: 1 and 0.
    """
    tiles, channels = moments.mean.shape
    if tiles > MOST_TILES:
        parts = cdiv(tiles, _MANY.rows)
        merged = Moments(
            buffers.empty(moments.count, parts, dtype=torch.float64),
            *(buffers.empty(moments.mean, parts, channels, dtype=torch.float64) for _ in range(2)),
        )
        grid = parts, cdiv(channels, _MANY.columns)
        launch(merge_kernel, grid, *moments, *merged, tiles, C=channels, **_MANY.launch)
        moments, tiles = merged, parts
    blocks = _blocks(tiles)
    coef = buffers.empty(moments.mean, 5, channels, dtype=torch.float32)
    launch(
        finalize_kernel,
        (cdiv(channels, blocks.columns),),
        *moments,
        gamma,
        beta,
        coef,
        tiles,
        eps,
        C=channels,
        IN_FLIGHT=_in_flight(coef),
        **blocks.launch,
    )
    return coef


@triton.jit
def running_coef_kernel(
    running_mean_ptr,
    running_var_ptr,
    gamma_ptr,
    beta_ptr,
    coef_ptr,
    eps,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`store_coef` of running_mean and running_var [C]; see `finalize_kernel`."""
    await_inputs()
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_ok = channel < C
    mean = tl.load(running_mean_ptr + channel, mask=channel_ok, other=0.0).to(tl.float64)
    var = tl.load(running_var_ptr + channel, mask=channel_ok, other=1.0).to(tl.float64)
    store_coef(mean, var, gamma_ptr, beta_ptr, eps, coef_ptr, channel, channel_ok, C)


def running_coef(
    running_mean: Tensor, running_var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> Tensor:
    """Coefficients [5, C] fp32 of a BatchNorm that normalises by its running statistics [C]."""
    channels = running_mean.shape[0]
    coef = buffers.empty(running_mean, 5, channels, dtype=torch.float32)
    launch(
        running_coef_kernel,
        (cdiv(channels, VECTOR),),
        running_mean,
        running_var,
        gamma,
        beta,
        coef,
        eps,
        C=channels,
        BLOCK_C=VECTOR,
        num_warps=VECTOR_WARPS,
    )
    return coef


@triton.jit(do_not_specialize=["T"])
def partial_sums_kernel(
    x_ptr, out_ptr, T, COLUMNS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, WARPS: tl.constexpr
):
    """Sums of every BLOCK_T rows: x [T, COLUMNS] fp32 to out [S, COLUMNS] fp64. Moves both once."""
    await_inputs()
    part = tl.program_id(0)
    first = part.to(tl.int64) * BLOCK_T
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    column_ok = column < COLUMNS
    row = tl.arange(0, BLOCK_T)
    ok = (row < T - part * BLOCK_T)[:, None] & column_ok[None, :]
    x = tl.load(x_ptr + first * COLUMNS + (row * COLUMNS)[:, None] + column[None, :], mask=ok, other=0.0)
    total = sum_pixels(tl.trans(x.to(tl.float64)), 32, WARPS)
    tl.store(out_ptr + part * COLUMNS + column, total, mask=column_ok)


@triton.jit(do_not_specialize=["T", "count", "parts"])
def bn_backward_coef_kernel(
    sums_ptr,
    coef_ptr,
    abc_ptr,
    dgamma_ptr,
    dbeta_ptr,
    parts_ptr,
    dw_ptr,
    T,
    count,
    size,
    parts,
    TRAINING: tl.constexpr,
    C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WARPS: tl.constexpr,
    IN_FLIGHT: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``dbeta = sum(dz), dgamma = sum(dz*xhat)``; A = scale, B = -scale*rstd*dgamma/n, C = -scale*dbeta/n - B*mean.

    From ``dy = scale * (dz - mean(dz) - xhat*mean(dz*xhat))``; with statistics that are constants B and C are 0. The
    programs behind those of the channels are `sum_parts` of another layer's weight gradient.

    Args:
        sums_ptr: [T, 2, C], fp32 or fp64: sums of dz and of dz*xhat. coef_ptr: [5, C].
        abc_ptr: [3, C]. dgamma_ptr, dbeta_ptr: [C].
        parts_ptr, dw_ptr, size, parts: see `sum_parts`; or None both.
        count: n, pixels.
    """
    await_inputs()
    program = tl.program_id(0)
    if parts_ptr is None:
        store_backward_coef(
            sums_ptr,
            coef_ptr,
            abc_ptr,
            dgamma_ptr,
            dbeta_ptr,
            T,
            count,
            program,
            TRAINING,
            C,
            BLOCK_T,
            BLOCK_C,
            WARPS,
            IN_FLIGHT,
        )
    else:
        CHANNEL_PROGRAMS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
        if program < CHANNEL_PROGRAMS:
            store_backward_coef(
                sums_ptr,
                coef_ptr,
                abc_ptr,
                dgamma_ptr,
                dbeta_ptr,
                T,
                count,
                program,
                TRAINING,
                C,
                BLOCK_T,
                BLOCK_C,
                WARPS,
                IN_FLIGHT,
            )
        else:
            sum_parts(parts_ptr, dw_ptr, size, parts, program - CHANNEL_PROGRAMS, PARTS, BLOCK, WARPS)


@triton.jit
def store_backward_coef(
    sums_ptr,
    coef_ptr,
    abc_ptr,
    dgamma_ptr,
    dbeta_ptr,
    T,
    count,
    program,
    TRAINING: tl.constexpr,
    C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WARPS: tl.constexpr,
    IN_FLIGHT: tl.constexpr,
):
    """A program's BLOCK_C channels of `bn_backward_coef_kernel`."""
    channel = program * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_ok = channel < C
    row = tl.arange(0, BLOCK_T)
    offset = (row * (2 * C))[:, None] + channel[None, :]
    dz = tl.zeros((BLOCK_T, BLOCK_C), sums_ptr.dtype.element_ty)
    dz_lost = dz
    dz_xhat = dz
    dz_xhat_lost = dz
    for start in tl.range(0, T, BLOCK_T, loop_unroll_factor=IN_FLIGHT):
        ok = (start + row < T)[:, None] & channel_ok[None, :]
        of_rows = sums_ptr + start * (2 * C) + offset
        dz, dz_lost = two_sum(dz, dz_lost, tl.load(of_rows, mask=ok, other=0.0))
        dz_xhat, dz_xhat_lost = two_sum(dz_xhat, dz_xhat_lost, tl.load(of_rows + C, mask=ok, other=0.0))
    dbeta = compensated(dz, dz_lost, WARPS)
    dgamma = compensated(dz_xhat, dz_xhat_lost, WARPS)
    scale = tl.load(coef_ptr + SCALE * C + channel, mask=channel_ok, other=0.0)
    if TRAINING:
        mean = tl.load(coef_ptr + MEAN * C + channel, mask=channel_ok, other=0.0).to(tl.float64)
        rstd = tl.load(coef_ptr + RSTD * C + channel, mask=channel_ok, other=0.0).to(tl.float64)
        share = -scale.to(tl.float64) / count
        b = share * rstd * dgamma
        c = share * dbeta - b * mean
    else:
        b = tl.zeros_like(dgamma)
        c = tl.zeros_like(dbeta)
    tl.store(abc_ptr + channel, scale, mask=channel_ok)
    tl.store(abc_ptr + C + channel, b.to(tl.float32), mask=channel_ok)
    tl.store(abc_ptr + 2 * C + channel, c.to(tl.float32), mask=channel_ok)
    tl.store(dgamma_ptr + channel, dgamma.to(tl.float32), mask=channel_ok)
    tl.store(dbeta_ptr + channel, dbeta.to(tl.float32), mask=channel_ok)


def bn_backward_coef(sums: Tensor, coef: Tensor, count: int, training: bool) -> tuple[Tensor, Tensor, Tensor]:
    """BatchNorm's backward as ``dy = A*dz + B*y + C``: abc [3, C]; and the gradients of gamma and beta [C]; fp32.

    Args:
        sums: [T, 2, C] fp32, partial sums of dz and of dz * xhat.
        coef: [5, C] fp32.
        count: pixels, over which the statistics were taken.
        training: whether they are of this batch and so depend on y.
    """
    tiles, _, channels = sums.shape
    if tiles > MOST_TILES:
        rows = cdiv(tiles, _MANY.rows)
        partial = buffers.empty(sums, rows, 2, channels, dtype=torch.float64)
        grid = rows, cdiv(2 * channels, _MANY.columns)
        launch(partial_sums_kernel, grid, sums, partial, tiles, COLUMNS=2 * channels, **_MANY.launch)
        sums, tiles = partial, rows
    blocks = _blocks(tiles)
    abc = buffers.empty(coef, 3, channels)
    dgamma, dbeta = (buffers.empty(coef, channels) for _ in range(2))
    parts, dw = waiting()
    size, count_of_parts = (0, 0) if parts is None or dw is None else (dw.numel(), parts.shape[0])
    rows_of_tile, block = sum_tile(count_of_parts, size, blocks.warps)
    launch(
        bn_backward_coef_kernel,
        (cdiv(channels, blocks.columns) + cdiv(size, block),),
        sums,
        coef,
        abc,
        dgamma,
        dbeta,
        parts,
        dw,
        tiles,
        count,
        size,
        count_of_parts,
        TRAINING=training,
        C=channels,
        PARTS=rows_of_tile,
        BLOCK=block,
        IN_FLIGHT=_in_flight(coef),
        **blocks.launch,
    )
    return abc, dgamma, dbeta
