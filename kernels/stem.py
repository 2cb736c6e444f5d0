"""The first convolution of a network: a window with stride 2 over images of up to four channels.

Channels that few fill no wide load and no tensor core, and a window of pixels of 6 bytes has addresses of its own for
each value. So a pass spreads the image by squares of 2x2 pixels, each of which becomes one pixel of 16 channels (space
to depth), with the padding as zeros around it; the window is then half as high and wide, with stride 1, and each of its
rows is one piece of memory. Weights are spread in the same way, and so is their gradient, which is gathered again.

A window of an odd side reads one pixel more, with weights of 0: what is not finite there makes a NaN of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastres.kernels import buffers
from fastres.kernels.configs import Config, at_rank, has_warp_groups, precision, programs_at_once, steps_of
from fastres.kernels.dependent import await_inputs
from fastres.kernels.geometry import Pad, cdiv, output_hw, power_of_2
from fastres.kernels.launch import launch
from fastres.kernels.resources import Demand, fitting
from fastres.kernels.tiles import load_gradient, repeats, store_part_moments, welford, within
from fastres.kernels.types import Moments

CHANNELS = tl.constexpr(4)  # of a pixel of the image, zeros behind those that it has
PITCH = tl.constexpr(16)  # of a square of 2x2 pixels
BLOCK, WARPS = 1024, 4
# By the model (`bench.machine`): two programs of 4 warps a multiprocessor, all taps in one step.
FORWARD, WEIGHTS = Config(32, 64, 256, 4, 3, 168), Config(32, 64, 256, 4, 3, 255)


@triton.jit
def spread_kernel(
    x_ptr,
    out_ptr,
    size,
    H,
    W,
    RH,
    RW,
    C: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``out[n, r, q, (i, j, c)] = x[n, 2r + i - TOP, 2q + j - LEFT, c]``, 0 outside of x and for channels from C on.

    Moves x and out once.

    Args:
        x_ptr: [N, H, W, C]. out_ptr: [N, RH, RW, 16], ``size`` squares.
        BLOCK: squares of a program.
    """
    await_inputs()
    square = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, PITCH)
    image = square // (RH * RW)
    inside_image = (square - image * (RH * RW)).to(tl.int32)
    h = (inside_image // RW * 2 - TOP)[:, None] + (k // 8)[None, :]
    v = (inside_image % RW * 2 - LEFT)[:, None] + (k // CHANNELS % 2)[None, :]
    c = (k % CHANNELS)[None, :]
    ok = (square < size)[:, None]
    inside = ok & (h >= 0) & (h < H) & (v >= 0) & (v < W) & (c < C)
    values = tl.load(x_ptr + (image * (H * W * C))[:, None] + (h * W + v) * C + c, mask=inside, other=0.0)
    tl.store(out_ptr + (square * PITCH)[:, None] + k[None, :], values, mask=ok)


@triton.jit
def conv_stem_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    count_ptr,
    mean_ptr,
    m2_ptr,
    M,
    steps,
    OH: tl.constexpr,
    OW: tl.constexpr,
    COUT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``y = conv2d(x, w)`` of ``steps`` blocks of BLOCK_M pixels, and the count, mean and M2 of those y.

    As `fastres.kernels.resident.conv_resident_kernel`; all taps and channels are the depth of one product. Moves x
    about once, y once.

    Args:
        x_ptr: [N, OH + KH' - 1, OW + KW' - 1, 16] spread, with KH' x KW' = ceil(KH / 2) x ceil(KW / 2). w_ptr: [COUT,
            KH', KW', 16] spread. y_ptr: [M, COUT], M = N*OH*OW.
        count_ptr, mean_ptr, m2_ptr: [T], [T, COUT], [T, COUT] fp32, a part of the pixels each; or None.
        BLOCK_N: no less than COUT. BLOCK_K: no less than KH' * KW' * 16. STAGES: steps in flight.
    """
    await_inputs()
    DEPTH: tl.constexpr = (KH + 1) // 2 * ((KW + 1) // 2) * PITCH
    part = tl.program_id(0)
    n = tl.arange(0, BLOCK_N)
    n_ok = within(n, COUT, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    k_ok = within(k, DEPTH, BLOCK_K)
    row = tl.arange(0, BLOCK_M)
    w = tl.load(w_ptr + (n * DEPTH)[:, None] + k[None, :], mask=n_ok[:, None] & k_ok[None, :], other=0.0)
    first = part.to(tl.int64) * (steps * BLOCK_M)
    pixels = tl.minimum(M - first, steps * BLOCK_M).to(tl.int32)
    y_ptr += first * COUT
    mean = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    m2 = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    repeats(steps)
    for step in tl.range(0, steps, num_stages=STAGES):
        pixel = step * BLOCK_M + row
        row_ok = pixel < pixels
        offset = window(first, pixel, k, OH, OW, KH, KW)
        a = tl.load(x_ptr + offset, mask=row_ok[:, None] & k_ok[None, :], other=0.0)
        y = tl.dot(w, tl.trans(a), input_precision=PRECISION).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + n[:, None] + (pixel * COUT)[None, :], y, mask=n_ok[:, None] & row_ok[None, :])
        if mean_ptr is not None:
            mean, m2 = welford(y.to(tl.float32), row_ok[None, :], step, mean, m2)
    if mean_ptr is not None:
        store_part_moments(mean, m2, pixels, row, count_ptr, mean_ptr, m2_ptr, part, n, n_ok, COUT, True, 0, 0)


@triton.jit
def window(first, pixel, k, OH: tl.constexpr, OW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr):
    """Offsets [BM, BK] in the spread image of the windows of the pixels ``first + pixel`` of [N, OH, OW]."""
    ROW: tl.constexpr = (KW + 1) // 2 * PITCH
    RW: tl.constexpr = OW + (KW + 1) // 2 - 1
    RH: tl.constexpr = OH + (KH + 1) // 2 - 1
    image = first // (OH * OW)
    m = (first - image * (OH * OW)).to(tl.int32) + pixel
    place = (m // (OH * OW) * RH + m // OW % OH) * RW + m % OW
    return image * (RH * RW * PITCH) + (place * PITCH)[:, None] + (k // ROW * (RW * PITCH) + k % ROW)[None, :]


@triton.jit
def conv_stem_wgrad_kernel(
    dz_ptr,
    y_ptr,
    abc_ptr,
    x_ptr,
    dw_ptr,
    M,
    steps,
    OH: tl.constexpr,
    OW: tl.constexpr,
    COUT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``dw = (A*dz + B*y + C)^T x`` of ``steps`` blocks of BLOCK_M pixels, for all taps; see `conv_stem_kernel`.

    Moves dz and y once, x about once.

    Args:
        dz_ptr, y_ptr: [M, COUT]. abc_ptr: [3, COUT] fp32; None: dz is the convolution's gradient. y_ptr: None without
            abc_ptr, and where B and C are 0.
        dw_ptr: [T, COUT, KH', KW', 16] fp32, a part of the pixels each.
    """
    await_inputs()
    DEPTH: tl.constexpr = (KH + 1) // 2 * ((KW + 1) // 2) * PITCH
    part = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    n_ok = within(n, COUT, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    k_ok = within(k, DEPTH, BLOCK_K)
    row = tl.arange(0, BLOCK_M)
    first = part * (steps * BLOCK_M)
    pixels = tl.minimum(M - first, steps * BLOCK_M).to(tl.int32)
    dw = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    repeats(steps)
    for step in tl.range(0, steps, num_stages=STAGES):
        pixel = step * BLOCK_M + row
        row_ok = pixel < pixels
        offset = window(first, pixel, k, OH, OW, KH, KW)
        a = tl.load(x_ptr + offset, mask=row_ok[:, None] & k_ok[None, :], other=0.0)
        dz_offset = first * COUT + (pixel * COUT)[:, None] + n[None, :]
        ok = row_ok[:, None] & n_ok[None, :]
        dy = load_gradient(dz_ptr, y_ptr, abc_ptr, dz_offset, ok, row_ok, n, n_ok, COUT)
        dw = tl.dot(tl.trans(dy), a, dw, input_precision=PRECISION)
    w_offset = (n * DEPTH)[:, None] + k[None, :]
    tl.store(dw_ptr + part * (COUT * DEPTH) + w_offset, dw, mask=n_ok[:, None] & k_ok[None, :])


@triton.jit
def gather_kernel(
    spread_ptr,
    dw_ptr,
    parts,
    size,
    C: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``dw[o, h, v, c] = sum over p of spread[p, o, h // 2, v // 2, (h % 2, v % 2, c)]``. Moves what it reads once.

    Args:
        spread_ptr: [parts, COUT, KH', KW', 16] fp32, ``size`` elements a part. dw_ptr: [COUT, KH, KW, C] fp32.
    """
    await_inputs()
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tap = i // C
    h = tap // KW % KH
    v = tap % KW
    square = (tap // (KH * KW) * ((KH + 1) // 2) + h // 2) * ((KW + 1) // 2) + v // 2
    source = square * PITCH + h % 2 * 8 + v % 2 * CHANNELS + i % C
    ok = source < size
    total = tl.zeros((PARTS, BLOCK), tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        inside = (part < parts)[:, None] & ok[None, :]
        total += tl.load(spread_ptr + part[:, None] * size + source[None, :], mask=inside, other=0.0)
    tl.store(dw_ptr + i, tl.sum(total, 0), mask=ok)


def is_stem(
    cin: int, cout: int, kernel_hw: tuple[int, int], stride: int, dilation: int, dtype: torch.dtype, arch: int
) -> bool:
    """Whether `conv_stem` and `wgrad_stem` take such a convolution."""
    depth = cdiv(kernel_hw[0], 2) * cdiv(kernel_hw[1], 2) * PITCH.value
    fits = cin <= CHANNELS.value and cout <= FORWARD.block_n and 64 <= depth <= FORWARD.block_k
    return has_warp_groups(arch) and dtype.itemsize == 2 and (stride, dilation) == (2, 1) and fits


def spread(x: Tensor, hw: tuple[int, int], pad: tuple[int, int] = (0, 0)) -> Tensor:
    """x [N, H, W, C] by squares of 2x2 pixels from (-top, -left) on: [N, *hw, 16]; see `spread_kernel`.

    Args:
        hw: squares down and across.
        pad: pixels that the first square begins above and left of x.
    """
    n, height, width, channels = x.shape
    out = buffers.empty(x, n, *hw, PITCH.value)
    size = n * hw[0] * hw[1]
    block = BLOCK // PITCH.value
    sizes = dict(H=height, W=width, RH=hw[0], RW=hw[1], C=channels, TOP=pad[0], LEFT=pad[1])
    launch(spread_kernel, (cdiv(size, block),), x_ptr=x, out_ptr=out, size=size, **sizes, BLOCK=block, num_warps=WARPS)
    return out


def _squares(out_hw: tuple[int, int], kernel_hw: tuple[int, int]) -> tuple[int, int]:
    """Of the spread image that windows over ``out_hw`` pixels read."""
    return out_hw[0] + cdiv(kernel_hw[0], 2) - 1, out_hw[1] + cdiv(kernel_hw[1], 2) - 1


def _demand(kernel: str, tensor: Tensor, pixels: int, loaded: int, made: bool) -> Demand:
    common = dict(device=tensor.device, dtype=tensor.dtype, columns=1, vectors=0, made_columns=False, depth=pixels)
    return Demand(kernel=kernel, rows=loaded, made_rows=made, **common)  # type: ignore[arg-type]


def conv_stem(x: Tensor, w: Tensor, pad: Pad, moments: bool) -> tuple[Tensor, Moments | None]:
    """``y = conv2d(x, w)`` with stride 2 and the statistics of y, where `is_stem`; see `fastres.kernels.conv.conv`."""
    n, height, width, _ = x.shape
    cout, *kernel_hw, _ = w.shape
    window_hw = kernel_hw[0], kernel_hw[1]
    out_hw = output_hw((height, width), window_hw, 2, pad, 1)
    pixels = n * out_hw[0] * out_hw[1]
    config = at_rank([FORWARD], 0, fitting(_demand("conv_stem_kernel", x, pixels, 1, False)))
    steps = steps_of(pixels, 1, config, programs_at_once(config))
    parts = cdiv(pixels, config.block_m * steps)
    y = buffers.empty(x, n, *out_hw, cout)
    made = buffers.moments(x, parts, cout) if moments else None
    count, mean, m2 = made or (None, None, None)
    launch(
        conv_stem_kernel,
        (parts,),
        x_ptr=spread(x, _squares(out_hw, window_hw), pad[:2]),
        w_ptr=spread(w, (cdiv(window_hw[0], 2), cdiv(window_hw[1], 2))),
        y_ptr=y,
        count_ptr=count,
        mean_ptr=mean,
        m2_ptr=m2,
        M=pixels,
        steps=steps,
        OH=out_hw[0],
        OW=out_hw[1],
        COUT=cout,
        KH=window_hw[0],
        KW=window_hw[1],
        PRECISION=precision(x.dtype),
        STAGES=config.num_stages,
        **config.launch,
    )
    return y, made


def wgrad_stem(
    dz: Tensor, y: Tensor | None, abc: Tensor | None, x: Tensor, pad: Pad, kernel_hw: tuple[int, int]
) -> Tensor:
    """Gradient of the weight of `conv_stem`, fp32 [COUT, KH, KW, CIN]; see `fastres.kernels.wgrad.conv_wgrad`."""
    n, out_height, out_width, cout = dz.shape
    pixels, cin = n * out_height * out_width, x.shape[3]
    demand = _demand("conv_stem_wgrad_kernel", dz, pixels, 1 if y is None else 2, abc is not None)
    config = at_rank([WEIGHTS], 0, fitting(demand))
    steps = steps_of(pixels, 1, config, programs_at_once(config))
    parts = cdiv(pixels, config.block_m * steps)
    rows, columns = (cdiv(size, 2) for size in kernel_hw)
    dw = buffers.empty(dz, parts, cout, rows, columns, PITCH.value, dtype=torch.float32)
    launch(
        conv_stem_wgrad_kernel,
        (parts,),
        dz_ptr=dz,
        y_ptr=y,
        abc_ptr=abc,
        x_ptr=spread(x, _squares((out_height, out_width), kernel_hw), pad[:2]),
        dw_ptr=dw,
        M=pixels,
        steps=steps,
        OH=out_height,
        OW=out_width,
        COUT=cout,
        KH=kernel_hw[0],
        KW=kernel_hw[1],
        PRECISION=precision(dz.dtype),
        STAGES=config.num_stages,
        **config.launch,
    )
    out = buffers.empty(dz, cout, *kernel_hw, cin, dtype=torch.float32)
    count, block = power_of_2(parts, 1, 64), 16
    sizes = dict(parts=parts, size=dw[0].numel(), C=cin, KH=kernel_hw[0], KW=kernel_hw[1])
    grid = (cdiv(out.numel(), block),)
    launch(gather_kernel, grid, spread_ptr=dw, dw_ptr=out, **sizes, PARTS=count, BLOCK=block, num_warps=WARPS)
    return out
