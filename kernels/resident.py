"""A pointwise convolution whose weights stay where they are while the pixels go by."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastres.kernels import buffers
from fastres.kernels.configs import Product, at_rank, precision, programs_at_once, resident_configs, steps_of
from fastres.kernels.dependent import await_inputs
from fastres.kernels.geometry import cdiv
from fastres.kernels.launch import launch
from fastres.kernels.resources import Demand, fitting
from fastres.kernels.tiles import SCALE, SHIFT, relu, repeats, store_part_moments, welford, within
from fastres.kernels.types import Moments


@triton.jit
def conv_resident_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    coef_ptr,
    count_ptr,
    mean_ptr,
    m2_ptr,
    M,
    steps,
    CIN: tl.constexpr,
    COUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``y = relu(x*scale + shift) w^T`` of ``steps`` blocks of BLOCK_M pixels and BLOCK_N of the COUT channels; and the
    count, mean and M2 of those y.

    A program keeps its channels of w and goes through its pixels, whose loads are some steps ahead: it begins and ends
    once, where a program for each tile waits for its first loads and reduces its statistics each time. Statistics are
    those of the stored, rounded y, by Welford's recurrence for each place in the block. Moves x once for each block of
    channels, mostly from the L2, as the programs of the same pixels run at the same time; w for each part, y once.

    Args:
        x_ptr: [M, CIN]. w_ptr: [COUT, CIN]. y_ptr: [M, COUT]. coef_ptr: [5, CIN] or None: x as it is.
        count_ptr, mean_ptr, m2_ptr: [T], [T, COUT], [T, COUT] fp32, a part of the pixels each; or None.
        BLOCK_K: no less than CIN. STAGES: steps in flight.
    """
    await_inputs()
    GROUPS: tl.constexpr = (COUT + BLOCK_N - 1) // BLOCK_N
    part = tl.program_id(0) // GROUPS
    n = (tl.program_id(0) % GROUPS) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_ok = within(n, COUT, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    k_ok = within(k, CIN, BLOCK_K)
    row = tl.arange(0, BLOCK_M)
    # 1. What stays. Offsets count from the part's first pixel.
    w = tl.load(w_ptr + (n * CIN)[:, None] + k[None, :], mask=n_ok[:, None] & k_ok[None, :], other=0.0)
    if coef_ptr is not None:
        scale = tl.load(coef_ptr + SCALE * CIN + k, mask=k_ok, other=0.0)
        shift = tl.load(coef_ptr + SHIFT * CIN + k, mask=k_ok, other=0.0)
    first = part.to(tl.int64) * (steps * BLOCK_M)
    pixels = tl.minimum(M - first, steps * BLOCK_M).to(tl.int32)
    x_ptr += first * CIN
    y_ptr += first * COUT

    mean = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    m2 = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    repeats(steps)
    for step in tl.range(0, steps, num_stages=STAGES):
        pixel = step * BLOCK_M + row
        row_ok = pixel < pixels
        # 2. What is read, through the BatchNorm. Pixels that do not exist are neither stored nor counted.
        ok = row_ok[:, None] & k_ok[None, :]
        a = tl.load(x_ptr + (pixel * CIN)[:, None] + k[None, :], mask=ok, other=0.0)
        if coef_ptr is not None:
            a = relu(a.to(tl.float32) * scale[None, :] + shift[None, :]).to(a.dtype)
        # 3. The product, channels as rows, and its statistics.
        y = tl.dot(w, tl.trans(a), input_precision=PRECISION).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + n[:, None] + (pixel * COUT)[None, :], y, mask=n_ok[:, None] & row_ok[None, :])
        if mean_ptr is not None:
            mean, m2 = welford(y.to(tl.float32), row_ok[None, :], step, mean, m2)

    # 4. The part's statistics.
    if mean_ptr is not None:
        writes = tl.program_id(0) % GROUPS == 0
        store_part_moments(mean, m2, pixels, row, count_ptr, mean_ptr, m2_ptr, part, n, n_ok, COUT, writes, 0, 0)


def conv_resident(
    x: Tensor, w: Tensor, coef: Tensor | None, moments: bool, product: Product, rank: int
) -> tuple[Tensor, Moments | None]:
    """``y = conv2d(relu(x*scale + shift), w)`` of a 1x1 convolution with stride 1 and without padding, see
    `fastres.kernels.conv.conv`.

    Args:
        product: one that `resident_configs` has configurations for.
        rank: which of them, the first at 0.
    """
    n, height, width, cin = x.shape
    cout = w.shape[0]
    demand = Demand(
        kernel="conv_resident_kernel",
        device=x.device,
        dtype=x.dtype,
        rows=1,
        columns=1,
        vectors=0,
        made_rows=coef is not None,
        made_columns=False,
        depth=product.rows,
    )
    config = at_rank(resident_configs(product), rank, fitting(demand))
    groups = cdiv(cout, config.block_n)
    steps = steps_of(product.rows, groups, config, programs_at_once(config))
    parts = cdiv(product.rows, config.block_m * steps)
    y = buffers.empty(x, n, height, width, cout)
    made = buffers.moments(x, parts, cout) if moments else None
    count, mean, m2 = made or (None, None, None)
    launch(
        conv_resident_kernel,
        (parts * groups,),
        x_ptr=x,
        w_ptr=w,
        y_ptr=y,
        coef_ptr=coef,
        count_ptr=count,
        mean_ptr=mean,
        m2_ptr=m2,
        M=product.rows,
        steps=steps,
        CIN=cin,
        COUT=cout,
        PRECISION=precision(x.dtype),
        STAGES=config.num_stages,
        **config.launch,
    )
    return y, made
