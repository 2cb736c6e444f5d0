"""Pools: max-pool of ``relu(bn(y))``, or GELU of that of ``bn(y)``, for the stem; the head's global average pool;
with their backwards.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastres.kernels import buffers
from fastres.kernels.dependent import await_inputs
from fastres.kernels.geometry import Pad, cdiv, check_pool, output_hw
from fastres.kernels.launch import launch
from fastres.kernels.row_tiles import POOL_ELEMENTS, SQUARE_ELEMENTS, WARPS, elementwise, reduction
from fastres.kernels.tiles import MEAN, activate, bn, gelu_backward, relu, relu_backward, store_sums, sum_pixels


@triton.jit(do_not_specialize=["M"])
def bn_relu_max_pool_kernel(
    y_ptr,
    coef_ptr,
    out_ptr,
    index_ptr,
    M,
    H: tl.constexpr,
    W: tl.constexpr,
    OH: tl.constexpr,
    OW: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    GELU: tl.constexpr,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``out = max over taps of relu(y*scale + shift)``, rounded to out's dtype before it is compared, as eager does.

    With GELU, which is not monotone, ``out = gelu(max over taps of y*scale + shift)``.

    index: the winning tap ``kh*KERNEL + kw``, the first among equals; a NaN wins over all. Padding never wins. Moves y
    about once (windows overlap in cache), out and index once.

    Args:
        y_ptr: [N, H, W, C]. coef_ptr: [5, C]. out_ptr, index_ptr: [M, C] = [N, OH, OW, C], y's dtype and uint8.
    """
    await_inputs()
    first = tl.program_id(0) * BLOCK_M
    row = tl.arange(0, BLOCK_M)
    row_ok = row < M - first
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_ok = channel < C
    # offsets inside a tile fit 32 bits, the offset of its first image may not
    image = first // (OH * OW)
    y_ptr += image.to(tl.int64) * H * W * C
    m = first - image * (OH * OW) + row
    top = m // OW % OH * STRIDE - TOP
    left = m % OW * STRIDE - LEFT
    pixel = (m // OW // OH * H + top) * W + left
    best = tl.full((BLOCK_M, BLOCK_C), -float("inf"), tl.float32)
    index = tl.zeros((BLOCK_M, BLOCK_C), tl.int32)
    for kh in tl.static_range(KERNEL):
        for kw in tl.static_range(KERNEL):
            inside = row_ok & (top + kh >= 0) & (top + kh < H) & (left + kw >= 0) & (left + kw < W)
            ok = inside[:, None] & channel_ok[None, :]
            offset = ((pixel + kh * W + kw) * C)[:, None] + channel[None, :]
            y = tl.load(y_ptr + offset, mask=ok, other=0.0)
            a = bn(y, coef_ptr, channel, channel_ok, C)
            if not GELU:
                a = relu(a)
            a = a.to(out_ptr.dtype.element_ty).to(tl.float32)
            wins = ok & ((a > best) | (a != a))
            best = tl.where(wins, a, best)
            index = tl.where(wins, kh * KERNEL + kw, index)
    if GELU:
        best = activate(best, GELU)
    offset = (row * C)[:, None] + channel[None, :]
    ok = row_ok[:, None] & channel_ok[None, :]
    tl.store(out_ptr + first.to(tl.int64) * C + offset, best.to(out_ptr.dtype.element_ty), mask=ok)
    tl.store(index_ptr + first.to(tl.int64) * C + offset, index.to(tl.uint8), mask=ok)


def bn_relu_max_pool(
    y: Tensor, coef: Tensor, kernel: int, stride: int, pad: Pad, act: str = "relu"
) -> tuple[Tensor, Tensor]:
    """Max-pool of ``relu(y*scale + shift)`` [N, OH, OW, C] in y's dtype, and the winning tap of each, uint8.

    Args:
        y: [N, H, W, C].
        coef: [5, C] fp32, see `fastres.kernels.tiles`.
        kernel: at most 16, as taps are counted in a byte.
        pad: top, left, bottom, right; padded pixels never win.
        act: one of `fastres.kernels.types.ACTIVATIONS`; GELU, which is not monotone, comes behind the pool.

    Raises:
        ValueError: for a larger kernel.
    """
    check_pool(kernel)
    n, height, width, channels = y.shape
    out_hw = output_hw((height, width), (kernel, kernel), stride, pad)
    out = buffers.empty(y, n, *out_hw, channels)
    index = buffers.empty(y, n, *out_hw, channels, dtype=torch.uint8)
    rows = n * out_hw[0] * out_hw[1]
    split = elementwise(rows, channels, POOL_ELEMENTS)
    launch(
        bn_relu_max_pool_kernel,
        split.grid,
        y,
        coef,
        out,
        index,
        rows,
        height,
        width,
        *out_hw,
        KERNEL=kernel,
        STRIDE=stride,
        TOP=pad[0],
        LEFT=pad[1],
        GELU=act == "gelu",
        C=channels,
        **split.launch,
    )
    return out, index


MOST_UNROLLED = tl.constexpr(3)  # stride of a pool whose squares are unrolled


@triton.jit
def place(i, j, turn, SIDE: tl.constexpr, STRIDE: tl.constexpr):
    """Row and column in its square of the pixel (i, j) of what is unrolled: constants where that is the square, those
    of the program's ``turn`` elsewhere."""
    if SIDE == STRIDE:
        return i, j
    else:
        return turn // STRIDE % STRIDE, turn % STRIDE


@triton.jit(do_not_specialize=["M", "tiles"])
def bn_relu_max_pool_backward_kernel(
    dout_ptr,
    index_ptr,
    y_ptr,
    coef_ptr,
    dz_ptr,
    sums_ptr,
    M,
    tiles,
    H: tl.constexpr,
    W: tl.constexpr,
    OH: tl.constexpr,
    OW: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    GELU: tl.constexpr,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WARPS: tl.constexpr,
):
    """``dz`` = sum of dout over the windows that the pixel won, where ``relu(y*scale + shift) > 0``; sums as in
    `fastres.kernels.bn_add_relu`, of dz as it is stored. With GELU that sum times its derivative.

    A row of a tile is a square of STRIDE x STRIDE pixels, counted from the first window's corner: which tap of which
    window a pixel of it is does not depend on the square. So taps are constants; of large strides, whose squares would
    be much code, the pixels of all squares come one after the other, and taps are scalars. Each pixel gathers from the
    at most ceil(KERNEL/STRIDE)^2 windows that hold it, in the order of the taps: no atomics. Moves y and dz once, dout
    and index about once (windows overlap in cache).

    Args:
        dout_ptr, index_ptr: [N, OH, OW, C]. y_ptr, dz_ptr: [N, H, W, C]. coef_ptr: [5, C].
        sums_ptr: [T, 2, C]. M: squares. tiles: tiles of BLOCK_M squares that a program goes through.
    """
    await_inputs()
    SPAN: tl.constexpr = (KERNEL + STRIDE - 1) // STRIDE
    ACROSS: tl.constexpr = (W + LEFT + STRIDE - 1) // STRIDE  # squares of an image
    SQUARES: tl.constexpr = (H + TOP + STRIDE - 1) // STRIDE * ACROSS
    SIDE: tl.constexpr = STRIDE if STRIDE <= MOST_UNROLLED else 1  # of what is unrolled of a square
    PLACES: tl.constexpr = (STRIDE // SIDE) * (STRIDE // SIDE)
    part = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_ok = channel < C
    row = tl.arange(0, BLOCK_M)
    mean = tl.load(coef_ptr + MEAN * C + channel, mask=channel_ok, other=0.0)[None, :]
    sum_dz = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    sum_dz_y = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for turn in range(tiles * PLACES):
        # Offsets inside a tile fit 32 bits, that of its first image may not.
        first = (part * tiles + turn // PLACES) * BLOCK_M
        image = first // SQUARES
        pixels = image.to(tl.int64) * H * W * C
        windows = image.to(tl.int64) * OH * OW * C
        square = first - image * SQUARES + row
        square_ok = row < M - first
        image = square // SQUARES
        down = square // ACROSS % (SQUARES // ACROSS)
        across = square % ACROSS
        # All loads come before the first store, which none may pass.
        ys = ()  # type: tuple
        oks = ()  # type: tuple
        offsets = ()  # type: tuple
        for i in tl.static_range(SIDE):
            for j in tl.static_range(SIDE):
                at_h, at_w = place(i, j, turn, SIDE, STRIDE)
                h = down * STRIDE + (at_h - TOP)
                w = across * STRIDE + (at_w - LEFT)
                inside = square_ok & (h >= 0) & (h < H) & (w >= 0) & (w < W)
                oks = oks + (inside[:, None] & channel_ok[None, :],)
                offsets = offsets + ((((image * H + h) * W + w) * C)[:, None] + channel[None, :],)
                ys = ys + (tl.load(y_ptr + pixels + offsets[i * SIDE + j], mask=oks[i * SIDE + j], other=0.0),)
        dzs = ()  # type: tuple
        for i in tl.static_range(SIDE):
            for j in tl.static_range(SIDE):
                at_h, at_w = place(i, j, turn, SIDE, STRIDE)
                grad = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
                for back_h in tl.static_range(SPAN):
                    for back_w in tl.static_range(SPAN):
                        if i + back_h * STRIDE < KERNEL and j + back_w * STRIDE < KERNEL:
                            kh = at_h + back_h * STRIDE
                            kw = at_w + back_w * STRIDE
                            oh = down - back_h
                            ow = across - back_w
                            inside = square_ok & (oh >= 0) & (oh < OH) & (ow >= 0) & (ow < OW)
                            if SIDE < STRIDE:
                                inside = inside & (kh < KERNEL) & (kw < KERNEL)
                            ok = inside[:, None] & channel_ok[None, :]
                            offset = (((image * OH + oh) * OW + ow) * C)[:, None] + channel[None, :]
                            index = tl.load(index_ptr + windows + offset, mask=ok, other=0).to(tl.int32)
                            dout = tl.load(dout_ptr + windows + offset, mask=ok, other=0.0).to(tl.float32)
                            grad += tl.where(index == kh * KERNEL + kw, dout, 0.0)
                y = ys[i * SIDE + j].to(tl.float32)
                z = bn(y, coef_ptr, channel, channel_ok, C)
                if GELU:
                    dz = gelu_backward(grad, z).to(dz_ptr.dtype.element_ty)
                else:
                    a = relu(z).to(y_ptr.dtype.element_ty).to(tl.float32)
                    dz = relu_backward(grad, a).to(dz_ptr.dtype.element_ty)
                dzs = dzs + (dz,)
                sum_dz += dz.to(tl.float32)
                sum_dz_y += dz.to(tl.float32) * (y - mean)
        for i in tl.static_range(SIDE * SIDE):
            tl.store(dz_ptr + pixels + offsets[i], dzs[i], mask=oks[i])
    BITS: tl.constexpr = 128 * 32 * WARPS // (BLOCK_M * BLOCK_C)  # as a thread has fewer channels than 16 bytes
    of_dz = sum_pixels(tl.trans(sum_dz), BITS, WARPS)
    of_dz_y = sum_pixels(tl.trans(sum_dz_y), BITS, WARPS)
    store_sums(of_dz, of_dz_y, coef_ptr, sums_ptr, part, channel, channel_ok, C)


def bn_relu_max_pool_backward(
    dout: Tensor, index: Tensor, y: Tensor, coef: Tensor, kernel: int, stride: int, pad: Pad, act: str = "relu"
) -> tuple[Tensor, Tensor]:
    """Gradient at BatchNorm's output, through the activation, and BatchNorm's partial sums.

    Args:
        dout, index: [N, OH, OW, C], the winning taps uint8.
        y, coef, kernel, stride, pad, act: as in `bn_relu_max_pool`.

    Returns:
        dz [N, H, W, C] in y's dtype, and [T, 2, C] fp32: sums of dz and dz * xhat.
    """
    n, height, width, channels = y.shape
    squares = n * cdiv(height + pad[0], stride) * cdiv(width + pad[1], stride)
    split = reduction(squares, channels, SQUARE_ELEMENTS)
    dz = buffers.empty(y, *y.shape)
    sums = buffers.empty(coef, split.grid[0], 2, channels)
    launch(
        bn_relu_max_pool_backward_kernel,
        split.grid,
        dout,
        index,
        y,
        coef,
        dz,
        sums,
        squares,
        split.tiles,
        height,
        width,
        dout.shape[1],
        dout.shape[2],
        KERNEL=kernel,
        STRIDE=stride,
        TOP=pad[0],
        LEFT=pad[1],
        GELU=act == "gelu",
        C=channels,
        WARPS=WARPS,
        **split.launch,
    )
    return dz, sums


@triton.jit(do_not_specialize=["HW"])
def global_avg_pool_kernel(
    x_ptr, out_ptr, HW, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, WARPS: tl.constexpr
):
    """``out[n] = mean over pixels of x[n]``, accumulated in fp32; an image a program. Moves x and out once.

    Args:
        x_ptr: [N, HW, C]. out_ptr: [N, C].
    """
    await_inputs()
    image = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_ok = channel < C
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(0, HW, BLOCK_M):
        ok = (start + row < HW)[:, None] & channel_ok[None, :]
        x = tl.load(x_ptr + (image * HW + start) * C + (row * C)[:, None] + channel[None, :], mask=ok, other=0.0)
        total += x.to(tl.float32)
    mean = sum_pixels(tl.trans(total), x_ptr.dtype.element_ty.primitive_bitwidth, WARPS) / HW
    tl.store(out_ptr + image * C + channel, mean.to(out_ptr.dtype.element_ty), mask=channel_ok)


def global_avg_pool(x: Tensor) -> Tensor:
    """Mean over the pixels of x [N, H, W, C]: [N, C] in x's dtype."""
    n, height, width, channels = x.shape
    out = buffers.empty(x, n, channels)
    split = elementwise(height * width, channels)
    grid = n, split.grid[1]
    launch(global_avg_pool_kernel, grid, x, out, height * width, C=channels, WARPS=WARPS, **split.launch)
    return out


@triton.jit(do_not_specialize=["HW", "parts"])
def global_avg_pool_backward_kernel(
    dout_ptr, dx_ptr, HW, parts, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):
    """``dx[n, pixel] = dout[n] / HW``. Moves dx once, dout not at all to speak of.

    Args:
        dout_ptr: [N, C]. dx_ptr: [N, HW, C]. parts: programs that share an image's pixels.
    """
    await_inputs()
    image = (tl.program_id(0) // parts).to(tl.int64)
    first = tl.program_id(0) % parts * BLOCK_M
    row = tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_ok = channel < C
    share = tl.load(dout_ptr + image * C + channel, mask=channel_ok, other=0.0).to(tl.float32) / HW
    dx = tl.broadcast_to(share.to(dx_ptr.dtype.element_ty)[None, :], (BLOCK_M, BLOCK_C))
    ok = (first + row < HW)[:, None] & channel_ok[None, :]
    tl.store(dx_ptr + (image * HW + first) * C + (row * C)[:, None] + channel[None, :], dx, mask=ok)


def global_avg_pool_backward(dout: Tensor, hw: tuple[int, int]) -> Tensor:
    """Each pixel's share of dout [N, C], as [N, H, W, C] in dout's dtype."""
    n, channels = dout.shape
    pixels = hw[0] * hw[1]
    dx = buffers.empty(dout, n, *hw, channels)
    split = elementwise(pixels, channels)
    grid = n * split.grid[0], split.grid[1]
    launch(global_avg_pool_backward_kernel, grid, dout, dx, pixels, split.grid[0], C=channels, **split.launch)
    return dx
