"""Gradient at a convolution's input, BatchNorm's backward in its prologue, the activation and BatchNorm below in its
epilogue.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastres.kernels import buffers
from fastres.kernels.configs import MORE_REGISTERS, Product, at_rank, dgrad_configs, precision
from fastres.kernels.dependent import await_inputs
from fastres.kernels.geometry import Pad, cdiv, is_centred, is_pointwise
from fastres.kernels.launch import launch
from fastres.kernels.resources import Demand, architecture, falling_back, fitting
from fastres.kernels.tiles import (
    MEAN,
    RSTD,
    SCALE,
    SHIFT,
    TAP_BITS,
    activate,
    bn_backward,
    frozen_bn_backward,
    gelu_backward,
    relu_backward,
    repeats,
    subsample,
    sum_pixels,
    taps_inside,
    within,
    zero_outside,
)


@triton.jit
def conv_dgrad_kernel(
    dz_ptr,
    y_ptr,
    abc_ptr,
    w_ptr,
    dx_ptr,
    x_ptr,
    coef_ptr,
    mask_ptr,
    residual_ptr,
    sums_ptr,
    dy_ptr,
    a_ptr,
    N,
    tiles,
    c_blocks,
    H: tl.constexpr,
    W: tl.constexpr,
    OH: tl.constexpr,
    OW: tl.constexpr,
    CIN: tl.constexpr,
    COUT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    DILATION: tl.constexpr,
    TAP_STEP: tl.constexpr,
    INVERSE: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr,
    RESIDUAL_C: tl.constexpr,
    GELU: tl.constexpr,
    PRECISION: tl.constexpr,
    WARPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``dx = conv_transpose2d(A*dz + B*y + C, w) + residual``, through the ReLU of ``relu(x*scale + shift)``, with
    sums.

    The product's rows are the input's pixels, its columns the CIN channels; it sums over the taps that reach a pixel
    and the COUT channels. Pixel h is reached by the taps kh for which ``h + TOP - kh*dilation`` is a multiple of the
    stride: which these are its remainder modulo the stride tells, so rows are grouped by remainder (rh, rw), ``tiles``
    tiles each, and no product with a known zero is formed. Moves dz and y about once, w, residual, x and dx once.

    Args:
        dz_ptr, y_ptr: [N, OH, OW, COUT]. abc_ptr: [3, COUT] fp32; None: dz is the convolution's gradient. y_ptr: None
            without abc_ptr, and where B and C are 0.
        w_ptr: [COUT, KH, KW, CIN]. dx_ptr, residual_ptr, x_ptr: [N, H, W, CIN]. residual_ptr: or None.
        x_ptr, coef_ptr, sums_ptr: the BatchNorm below: its input, its [5, CIN], and [T, 2, CIN] fp32 for each tile's
            sums of dx and dx * xhat; or None: no BatchNorm and no ReLU.
        dy_ptr: like dz, receives what is computed of it and y, or None; at the tap by which every STRIDE-th pixel from
            the first on reads it.
        a_ptr: like x, receives ``relu(x*scale + shift)``, or None; without mask_ptr.
        mask_ptr: [N, H, W, CIN], the rectified tensor where it is not ``relu(x*scale + shift)`` but the end of a block;
            or None.
        c_blocks: blocks of COUT, an argument so that the loop is not unrolled.
        TAP_STEP: from one tap that reaches a pixel to the next: the stride without its greatest common divisor with the
            dilation. INVERSE: of the dilation without that divisor, modulo TAP_STEP.
        GELU: of the BatchNorm below, in place of ReLU; without mask_ptr.
        RESIDUAL_STRIDE, RESIDUAL_C: None both, or the residual is [N, ceil(H / RESIDUAL_STRIDE), ceil(W /
            RESIDUAL_STRIDE), RESIDUAL_C], whose first CIN channels are added to every RESIDUAL_STRIDE-th pixel.
    """
    await_inputs()
    POINTWISE: tl.constexpr = KH == 1 and KW == 1 and STRIDE == 1 and TOP == 0 and LEFT == 0
    CHANNEL_ROWS: tl.constexpr = BLOCK_N >= 64
    HALVES: tl.constexpr = BLOCK_N >= 128
    C_BLOCKS: tl.constexpr = (COUT + BLOCK_K - 1) // BLOCK_K
    N_TILES: tl.constexpr = (CIN + BLOCK_N - 1) // BLOCK_N
    DEPTH: tl.constexpr = KH * KW * CIN
    COMMON: tl.constexpr = STRIDE // TAP_STEP
    PIXEL_STEP: tl.constexpr = DILATION // COMMON
    MOST_H: tl.constexpr = (KH + TAP_STEP - 1) // TAP_STEP
    MOST_W: tl.constexpr = (KW + TAP_STEP - 1) // TAP_STEP
    tile = tl.program_id(0) // N_TILES
    n = (tl.program_id(0) % N_TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_ok = within(n, CIN, BLOCK_N)
    row = tl.arange(0, BLOCK_M)

    # Offsets count from the tile's first image (or row), whose own offset may need 64 bits.
    if POINTWISE:
        first = tile * BLOCK_M
        rows = N * H * W - first
        image = 0
        dz_first = first.to(tl.int64) * COUT
        x_first = first.to(tl.int64) * CIN
        x_pixel = row
        dz_pixel = row
        taps_w = 1
        trips = c_blocks
        oh = row * 0
        ow = row * 0
        kh0 = 0
        kw0 = 0
    else:
        if STRIDE == 1:
            rh = 0
            rw = 0
            first = tile * BLOCK_M
        else:
            rh = (tile // tiles) // STRIDE
            rw = (tile // tiles) % STRIDE
            first = (tile % tiles) * BLOCK_M
        # What is the same for all groups is compiled in, so that no division is by a variable.
        rows_h = H // STRIDE if H % STRIDE == 0 else (H - rh + STRIDE - 1) // STRIDE
        rows_w = W // STRIDE if W % STRIDE == 0 else (W - rw + STRIDE - 1) // STRIDE
        rows = N * rows_h * rows_w - first
        image = first // tl.maximum(rows_h * rows_w, 1)
        m = first - image * (rows_h * rows_w) + row
        h = m // tl.maximum(rows_w, 1) % tl.maximum(rows_h, 1)
        v = m % tl.maximum(rows_w, 1)
        i = m // tl.maximum(rows_h * rows_w, 1)
        kh0 = (rh + TOP) // COMMON * INVERSE % TAP_STEP
        kw0 = (rw + LEFT) // COMMON * INVERSE % TAP_STEP
        taps_h = (KH - kh0 + TAP_STEP - 1) // TAP_STEP
        taps_w = (KW - kw0 + TAP_STEP - 1) // TAP_STEP
        trips = taps_h * taps_w * c_blocks
        of_a_tap = 65536 // tl.maximum(taps_w, 1) + 1  # so that (tap * of_a_tap) >> 16 is tap // taps_w, up to 42 x 42
        if COMMON > 1:
            trips = tl.where(((rh + TOP) % COMMON == 0) & ((rw + LEFT) % COMMON == 0), trips, 0)
        oh = h + (rh + TOP - kh0 * DILATION) // STRIDE
        ow = v + (rw + LEFT - kw0 * DILATION) // STRIDE
        dz_first = image.to(tl.int64) * (OH * OW * COUT)
        x_first = image.to(tl.int64) * (H * W * CIN)
        dz_pixel = (i * OH + oh) * OW + ow
        x_pixel = (i * H + h * STRIDE + rh) * W + v * STRIDE + rw
        reached = taps_inside(oh, ow, row < rows, OH, OW, MOST_H, MOST_W, -PIXEL_STEP)

    row_ok = row < rows
    acc = tl.zeros((BLOCK_N, BLOCK_M) if CHANNEL_ROWS else (BLOCK_M, BLOCK_N), tl.float32)
    if COMMON == 1 and KH >= STRIDE and KW >= STRIDE:  # each pixel is reached by some tap
        repeats(trips)
    for block in range(trips):
        # 4. The channels and the tap of this step.
        c = (block % C_BLOCKS) * BLOCK_K + tl.arange(0, BLOCK_K)
        c_ok = within(c, COUT, BLOCK_K)
        if POINTWISE:
            inside = row_ok
            offset = (dz_pixel * COUT)[:, None] + c[None, :]
            w_tap = 0
        else:
            tap = block // C_BLOCKS
            if STRIDE == 1:
                tap_h = tap // KW
            elif KH <= 42 and KW <= 42:
                tap_h = (tap * of_a_tap) >> 16
            else:
                tap_h = tap // taps_w
            tap_w = tap - tap_h * taps_w
            th = tap_h * PIXEL_STEP
            tw = tap_w * PIXEL_STEP
            if MOST_H * MOST_W <= TAP_BITS:
                inside = (reached & (1 << (tap_h * MOST_W + tap_w))) != 0
            else:
                inside = row_ok & (oh >= th) & (oh - th < OH) & (ow >= tw) & (ow - tw < OW)
            offset = ((dz_pixel - th * OW - tw) * COUT)[:, None] + c[None, :]
            w_tap = ((kh0 + tap_h * TAP_STEP) * KW + kw0 + tap_w * TAP_STEP) * CIN
        ok = inside[:, None] & c_ok[None, :]
        a = tl.load(dz_ptr + dz_first + offset, mask=ok, other=0.0)
        b = tl.load(w_ptr + w_tap + (c * DEPTH)[:, None] + n[None, :], mask=c_ok[:, None] & n_ok[None, :], other=0.0)
        # 5. The prologue. Channels that do not exist have coefficients of 0, pixels that do not exist are not stored.
        if abc_ptr is not None:
            if y_ptr is not None:
                y = tl.load(y_ptr + dz_first + offset, mask=ok, other=0.0)
                dy = bn_backward(a, y, abc_ptr, c, c_ok, COUT)
            else:
                dy = frozen_bn_backward(a, abc_ptr, c, c_ok)
            if not POINTWISE:
                dy = zero_outside(dy, inside[:, None])
            a = dy.to(a.dtype)
            if dy_ptr is not None:
                once = (tl.program_id(0) % N_TILES == 0) & (w_tap == (TOP // DILATION * KW + LEFT // DILATION) * CIN)
                tl.store(dy_ptr + dz_first + offset, a, mask=ok & once)
        # 6. The product.
        if CHANNEL_ROWS:
            acc = tl.dot(tl.trans(b), tl.trans(a), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(a, b, acc, input_precision=PRECISION)

    # 7. The epilogue, channels as rows; of many channels in halves of the pixels, each with half the registers.
    if not CHANNEL_ROWS:
        acc = tl.trans(acc)
    shift = 0
    if RESIDUAL_STRIDE is not None and POINTWISE:
        image = first // (H * W)
        shift = first - image * (H * W)
    if HALVES:
        HALF: tl.constexpr = BLOCK_M // 2
        acc, second_acc = tl.split(tl.permute(tl.reshape(acc, (BLOCK_N, 2, HALF)), (0, 2, 1)))
        x_pixel, second_pixel = tl.split(tl.trans(tl.reshape(x_pixel, (2, HALF))))
        row = tl.arange(0, HALF)
        second_sums = store_gradient(
            second_acc, second_pixel, row + HALF < rows, x_first, image, shift, n, n_ok, dx_ptr, x_ptr, coef_ptr,
            mask_ptr, residual_ptr, a_ptr, H, W, CIN, RESIDUAL_STRIDE, RESIDUAL_C, POINTWISE, GELU, WARPS,
        )  # fmt: skip
    sums = store_gradient(
        acc, x_pixel, row < rows, x_first, image, shift, n, n_ok, dx_ptr, x_ptr, coef_ptr, mask_ptr, residual_ptr,
        a_ptr, H, W, CIN, RESIDUAL_STRIDE, RESIDUAL_C, POINTWISE, GELU, WARPS,
    )  # fmt: skip
    # 8. The tile's sums.
    if coef_ptr is not None:
        sum_dz, sum_dz_y = sums
        if HALVES:
            sum_dz += second_sums[0]
            sum_dz_y += second_sums[1]
        rstd = tl.load(coef_ptr + RSTD * CIN + n, mask=n_ok, other=0.0)
        sums_row = sums_ptr + tile.to(tl.int64) * (2 * CIN) + n
        tl.store(sums_row, sum_dz, mask=n_ok)
        tl.store(sums_row + CIN, sum_dz_y * rstd, mask=n_ok)


@triton.jit
def store_gradient(
    acc,
    x_pixel,
    row_ok,
    x_first,
    image,
    shift,
    n,
    n_ok,
    dx_ptr,
    x_ptr,
    coef_ptr,
    mask_ptr,
    residual_ptr,
    a_ptr,
    H,
    W,
    CIN: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr,
    RESIDUAL_C: tl.constexpr,
    POINTWISE: tl.constexpr,
    GELU: tl.constexpr,
    WARPS: tl.constexpr,
):
    """A product ``acc`` [BN, BM] with the residual, through the ReLU below, is stored to dx; see `conv_dgrad_kernel`.

    Args:
        x_pixel, row_ok: [BM]: the pixels, counted from x_first, and which of them there are.
        image, shift: the image that x_first is in, and how many of its pixels come before.
        n, n_ok: [BN]: the channels, and which of them there are.

    Returns:
        Sums over the pixels of dx and of ``dx * (x - mean)`` [BN]; zeros where there is no BatchNorm below.
    """
    offset = n[:, None] + (x_pixel * CIN)[None, :]
    ok = n_ok[:, None] & row_ok[None, :]
    if residual_ptr is not None:
        if RESIDUAL_STRIDE is None:
            acc += tl.load(residual_ptr + x_first + offset, mask=ok, other=0.0).to(tl.float32)
        else:
            pixel, added = subsample(x_pixel + shift, H, W, RESIDUAL_STRIDE)
            size = ((H + RESIDUAL_STRIDE - 1) // RESIDUAL_STRIDE) * ((W + RESIDUAL_STRIDE - 1) // RESIDUAL_STRIDE)
            source = residual_ptr + image.to(tl.int64) * (size * RESIDUAL_C)
            source += n[:, None] + (pixel * RESIDUAL_C)[None, :]
            acc += tl.load(source, mask=ok & added[None, :], other=0.0).to(tl.float32)
    # Rounded before the ReLU: the same values, and half the registers while x is there.
    dx = acc.to(dx_ptr.dtype.element_ty).to(tl.float32)
    if coef_ptr is not None:
        x = tl.load(x_ptr + x_first + offset, mask=ok, other=0.0).to(tl.float32)
        if mask_ptr is not None:
            out = tl.load(mask_ptr + x_first + offset, mask=ok, other=0.0).to(tl.float32)
        else:
            scale = tl.load(coef_ptr + SCALE * CIN + n, mask=n_ok, other=0.0)
            shift = tl.load(coef_ptr + SHIFT * CIN + n, mask=n_ok, other=0.0)
            out = x * scale[:, None] + shift[:, None]
            if a_ptr is not None:
                tl.store(a_ptr + x_first + offset, activate(out, GELU).to(a_ptr.dtype.element_ty), mask=ok)
        if GELU:
            dx = gelu_backward(dx, out).to(dx_ptr.dtype.element_ty).to(tl.float32)
        else:
            dx = relu_backward(dx, out)
        if POINTWISE:  # behind the last pixel the product is of C alone, elsewhere of zeros
            dx = zero_outside(dx, row_ok[None, :])
    tl.store(dx_ptr + x_first + offset, dx.to(dx_ptr.dtype.element_ty), mask=ok)
    sum_dx = tl.zeros((n.shape[0],), tl.float32)
    sum_dx_x = sum_dx
    if coef_ptr is not None:
        mean = tl.load(coef_ptr + MEAN * CIN + n, mask=n_ok, other=0.0)
        BITS: tl.constexpr = dx_ptr.dtype.element_ty.primitive_bitwidth
        sum_dx = sum_pixels(dx, BITS, WARPS)
        sum_dx_x = sum_pixels(dx * (x - mean[:, None]), BITS, WARPS)
    return sum_dx, sum_dx_x


@falling_back
def conv_dgrad(
    dz: Tensor,
    y: Tensor | None,
    abc: Tensor | None,
    w: Tensor,
    stride: int,
    pad: Pad,
    input_hw: tuple[int, int],
    below: tuple[Tensor, Tensor] | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    residual_stride: int = 1,
    rank: int = 0,
    dilation: int = 1,
    dy: Tensor | None = None,
    activation: Tensor | None = None,
    act: str = "relu",
) -> tuple[Tensor, Tensor | None]:
    """Gradient at the convolution's input, or through the activation of ``below`` with its BatchNorm's sums.

    Args:
        dz: [N, OH, OW, COUT], NHWC and contiguous, fp32, fp16 or bf16.
        y, abc: [N, OH, OW, COUT] and [3, COUT] fp32: the convolution's gradient is ``A*dz + B*y + C``; y None:
            ``A*dz``, both None: dz.
        w: [COUT, KH, KW, CIN] in dz's dtype.
        below: the BatchNorm whose rectified result the convolution read: its input [N, H, W, CIN] and its coef [5,
            CIN].
        mask: what the convolution read [N, H, W, CIN], where ReLU came after the addition of a shortcut to that
            BatchNorm.
        residual: [N, H, W, CIN], added to the gradient; or [N, H', W', C'], whose first CIN channels are added to every
            ``residual_stride``-th pixel, H' x W' of them.
        rank: which of `dgrad_configs`, the first at 0; the last where there are fewer.
        dilation: pixels from one tap of w to the next, both ways.
        dy: like dz: receives ``A*dz + B*y + C``, for the weight gradient, which then need not compute it again.
        activation: [N, H, W, CIN]: receives the rectified result of ``below``, likewise.
        act: behind ``below``, one of `fastres.kernels.types.ACTIVATIONS`; with a mask ReLU.

    Returns:
        dx [N, H, W, CIN], and the sums [T, 2, CIN] fp32 of dx and of dx * xhat by tiles, or None.

    Raises:
        ValueError: for a dy without abc, or of a window that is not centred (`fastres.kernels.geometry.is_centred`);
            for an activation that is not computed here.
    """
    n, out_height, out_width, cout = dz.shape
    _, kh, kw, cin = w.shape
    if dy is not None and (
        abc is None or not is_centred((kh, kw), pad, dilation, stride, input_hw, (out_height, out_width))
    ):
        raise ValueError(
            "dy is stored behind a BatchNorm alone, by a convolution of as many pixels as its stride leaves of the "
            f"input: not by {kh}x{kw} with stride {stride} and padding {pad} of {tuple(input_hw)}"
        )
    if activation is not None and (below is None or mask is not None):
        raise ValueError("the activation is stored where it is computed: with the BatchNorm below and without a mask")
    height, width = input_hw
    rows = n * cdiv(height, stride) * cdiv(width, stride)  # in the largest group
    demand = Demand(
        kernel="conv_dgrad_kernel",
        device=dz.device,
        dtype=dz.dtype,
        rows=1 if y is None else 2,
        columns=1,
        vectors=0 if abc is None else 1 if y is None else 3,
        made_rows=abc is not None,
        made_columns=False,
        depth=kh * kw * cout,
    )
    needed = MORE_REGISTERS if abc is not None and stride > 1 else 0
    gelu = below is not None and act == "gelu"
    if gelu:
        needed = MORE_REGISTERS
    if cin > 64 and gelu:  # 16 bytes would spill with 168
        needed = 255
    strided = residual is not None and residual.shape != (n, height, width, cin)
    product = Product(
        rows=rows * stride**2,
        columns=cin,
        depth=cout,
        dtype=dz.dtype,
        arch=architecture(dz.device),
        taps=kh * kw,
        loaded=demand.rows,
        made=demand.made_rows,
        least_registers=needed,
        stores=dy is not None,
        strided=strided,
        sums=below is not None,
        masked=mask is not None,
        keeps=activation is not None,
        step=stride,
        dilated=dilation > 1,
    )
    config = at_rank(dgrad_configs(product), rank, fitting(demand))
    tiles = cdiv(rows, config.block_m)
    dx = buffers.empty(dz, n, height, width, cin)
    common = math.gcd(stride, dilation)
    x = coef = sums = None
    if below is not None:
        x, coef = below
        sums = buffers.empty(dz, tiles * stride**2, 2, cin, dtype=torch.float32)
    images, sizes = n, (height, width, out_height, out_width)
    if stride == 1 and is_pointwise((kh, kw), pad) and not strided:
        images, sizes = rows, (1, 1, 1, 1)  # the kernel reads the number of pixels alone: one is compiled for all
    launch(
        conv_dgrad_kernel,
        (tiles * stride**2 * cdiv(cin, config.block_n),),
        dz_ptr=dz,
        y_ptr=y,
        abc_ptr=abc,
        w_ptr=w,
        dx_ptr=dx,
        x_ptr=x,
        coef_ptr=coef,
        mask_ptr=mask,
        residual_ptr=residual,
        sums_ptr=sums,
        dy_ptr=dy,
        a_ptr=activation,
        N=images,
        tiles=tiles,
        c_blocks=cdiv(cout, config.block_k),
        H=sizes[0],
        W=sizes[1],
        OH=sizes[2],
        OW=sizes[3],
        CIN=cin,
        COUT=cout,
        KH=kh,
        KW=kw,
        STRIDE=stride,
        TOP=pad[0],
        LEFT=pad[1],
        DILATION=dilation,
        TAP_STEP=stride // common,
        INVERSE=pow(dilation // common, -1, stride // common),
        RESIDUAL_STRIDE=residual_stride if strided else None,
        RESIDUAL_C=residual.shape[3] if residual is not None and strided else None,
        GELU=act == "gelu",
        PRECISION=precision(dz.dtype),
        WARPS=config.num_warps,
        **config.launch,
    )
    return dx, sums
