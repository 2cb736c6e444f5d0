"""Convolution as an implicit matrix product: BatchNorm and ReLU or GELU in its prologue, statistics in its epilogue."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastres.kernels import buffers
from fastres.kernels.configs import (
    LEAST,
    MORE_REGISTERS,
    Product,
    at_rank,
    conv_configs,
    precision,
    resident_configs,
)
from fastres.kernels.dependent import await_inputs
from fastres.kernels.geometry import Pad, cdiv, is_pointwise, output_hw
from fastres.kernels.launch import launch
from fastres.kernels.resident import conv_resident
from fastres.kernels.resources import Demand, architecture, falling_back, fitting
from fastres.kernels.stem import conv_stem, is_stem
from fastres.kernels.tiles import (
    TAP_BITS,
    activate,
    bn,
    relu,
    repeats,
    store_moments,
    taps_inside,
    within,
    zero_outside,
)
from fastres.kernels.types import Moments


@triton.jit
def conv_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    coef_ptr,
    shortcut_ptr,
    shortcut_coef_ptr,
    out_ptr,
    bias_ptr,
    residual_ptr,
    count_ptr,
    mean_ptr,
    m2_ptr,
    H,
    W,
    OH,
    OW,
    M,
    k_blocks,
    SIZES: tl.constexpr,
    CIN: tl.constexpr,
    COUT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    DILATION: tl.constexpr,
    FLAT: tl.constexpr,
    RELU: tl.constexpr,
    GELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``y = conv2d(relu(x*scale + shift), w) + bias + residual``, then ReLU; and each tile's count, mean and M2 of y.

    With GELU that is what the prologue takes in place of ReLU.
    The product's rows are the COUT channels, its columns the result's M = N*OH*OW pixels; it sums over the taps and the
    CIN channels: tap by tap, or, where the channels would not fill a tensor core (FLAT), over both as one axis. So
    wgmma reads both operands from the shared memory, and a channel's statistics are in one warp. Of fewer than 64
    channels, too few for wgmma's rows, the pixels are the rows.
    Padding is zero behind the prologue. Statistics are those of the stored, rounded y. Moves x about once (its taps and
    column tiles come from the L2), w, y once.

    With a shortcut, for a pointwise convolution, the prologue is the end of a residual block, ``out = relu(x*scale +
    shift + shortcut)`` with the shortcut normalised by its own coefficients where it has some, and out is stored as
    well.

    Args:
        x_ptr: [N, H, W, CIN]. w_ptr: [COUT, KH, KW, CIN]. y_ptr, residual_ptr: [N, OH, OW, COUT].
        coef_ptr: [5, CIN] or None: x as it is. shortcut_ptr, out_ptr: like x, or None both. shortcut_coef_ptr: [5, CIN]
            or None.
        bias_ptr: [COUT] fp32 or None. residual_ptr: or None.
        count_ptr, mean_ptr, m2_ptr: [T], [T, COUT], [T, COUT] fp32, T tiles of BLOCK_M rows; or None.
        SIZES: H, W, OH and OW, so that no division is by a variable; None: one kernel for all.
        k_blocks: trips of the loop; an argument, since a loop of known length would be unrolled.
        BLOCK_M, BLOCK_N: pixels and channels of a tile.
    """
    await_inputs()
    if SIZES is not None:
        H = SIZES[0]
        W = SIZES[1]
        OH = SIZES[2]
        OW = SIZES[3]
    POINTWISE: tl.constexpr = KH == 1 and KW == 1 and STRIDE == 1 and TOP == 0 and LEFT == 0
    CHANNEL_ROWS: tl.constexpr = BLOCK_N >= 64
    N_TILES: tl.constexpr = (COUT + BLOCK_N - 1) // BLOCK_N
    C_BLOCKS: tl.constexpr = (CIN + BLOCK_K - 1) // BLOCK_K
    DEPTH: tl.constexpr = KH * KW * CIN
    # 1. The tile: BLOCK_M pixels, BLOCK_N channels.
    tile = tl.program_id(0) // N_TILES
    row = tl.arange(0, BLOCK_M)
    first = tile * BLOCK_M
    rows = tl.minimum(M - first, BLOCK_M)
    row_ok = row < rows
    n = (tl.program_id(0) % N_TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_ok = within(n, COUT, BLOCK_N)

    # 2. Where the window of each pixel begins in x. Offsets inside a tile fit 32 bits, that of the tile may not.
    if POINTWISE:
        x_first = first.to(tl.int64) * CIN
        pixel = row
        top = row * 0
        left = row * 0
    else:
        image = first // (OH * OW)
        x_first = image.to(tl.int64) * (H * W * CIN)
        m = first - image * (OH * OW) + row
        top = (m // OW % OH) * STRIDE - TOP
        left = (m % OW) * STRIDE - LEFT
        pixel = ((m // OW // OH) * H + top) * W + left
        reached = taps_inside(top, left, row_ok, H, W, KH, KW, DILATION)

    acc = tl.zeros((BLOCK_N, BLOCK_M) if CHANNEL_ROWS else (BLOCK_M, BLOCK_N), tl.float32)
    repeats(k_blocks)
    for block in range(k_blocks):
        # 3. The taps and channels of this step.
        if FLAT:
            k = block * BLOCK_K + tl.arange(0, BLOCK_K)
            c = k % CIN
            kh = k // CIN // KW * DILATION
            kw = k // CIN % KW * DILATION
            k_ok = k < DEPTH
            h = top[:, None] + kh[None, :]
            v = left[:, None] + kw[None, :]
            inside = row_ok[:, None] & (h >= 0) & (h < H) & (v >= 0) & (v < W)
            offset = (pixel[:, None] + (kh * W + kw)[None, :]) * CIN + c[None, :]
        else:
            c = (block % C_BLOCKS) * BLOCK_K + tl.arange(0, BLOCK_K)
            tap = block // C_BLOCKS
            k = tap * CIN + c
            k_ok = within(c, CIN, BLOCK_K)
            if POINTWISE:
                inside = row_ok[:, None]
                offset = (pixel * CIN)[:, None] + c[None, :]
            else:
                kh = tap // KW * DILATION
                kw = tap % KW * DILATION
                if KH * KW <= TAP_BITS:
                    inside = (reached & (1 << tap)) != 0
                else:
                    inside = row_ok & (top + kh >= 0) & (top + kh < H) & (left + kw >= 0) & (left + kw < W)
                inside = inside[:, None]
                offset = ((pixel + kh * W + kw) * CIN)[:, None] + c[None, :]
        ok = inside & k_ok[None, :]
        a = tl.load(x_ptr + x_first + offset, mask=ok, other=0.0)
        b = tl.load(w_ptr + (n * DEPTH)[:, None] + k[None, :], mask=n_ok[:, None] & k_ok[None, :], other=0.0)
        # 4. The prologue. Channels that do not exist have coefficients of 0, pixels that do not exist are not stored.
        if coef_ptr is not None:
            z = bn(a, coef_ptr, c, k_ok, CIN)
            if shortcut_ptr is not None:
                shortcut = tl.load(shortcut_ptr + x_first + offset, mask=ok, other=0.0)
                if shortcut_coef_ptr is not None:
                    z += bn(shortcut, shortcut_coef_ptr, c, k_ok, CIN)
                else:
                    z += shortcut.to(tl.float32)
            if not POINTWISE:
                z = zero_outside(z, inside)
            a = activate(z, GELU).to(a.dtype)
            if out_ptr is not None:
                tl.store(out_ptr + x_first + offset, a, mask=ok & (tl.program_id(0) % N_TILES == 0))
        # 5. The product.
        if CHANNEL_ROWS:
            acc = tl.dot(b, tl.trans(a), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)

    # 6. The epilogue, channels as rows: what is added, ReLU, the result and its statistics.
    if not CHANNEL_ROWS:
        acc = tl.trans(acc)
    y_first = first.to(tl.int64) * COUT
    y_offset = n[:, None] + (row * COUT)[None, :]
    y_ok = n_ok[:, None] & row_ok[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n_ok, other=0.0)[:, None]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + y_first + y_offset, mask=y_ok, other=0.0).to(tl.float32)
    if RELU:
        acc = relu(acc)
    y = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + y_first + y_offset, y, mask=y_ok)
    if mean_ptr is not None:
        store_moments(
            y.to(tl.float32), rows, count_ptr, mean_ptr, m2_ptr, tile, n, n_ok, COUT, tl.program_id(0) % N_TILES == 0
        )


def conv(
    x: Tensor,
    w: Tensor,
    stride: int,
    pad: Pad,
    coef: Tensor | None = None,
    residual: Tensor | None = None,
    moments: bool = True,
    rank: int = 0,
    dilation: int = 1,
    act: str = "relu",
) -> tuple[Tensor, Moments | None]:
    """``y = conv2d(relu(x*scale + shift), w) (+ residual)`` [N, OH, OW, COUT] and the statistics of y.

    Args:
        x: [N, H, W, CIN], NHWC and contiguous, fp32, fp16 or bf16.
        w: [COUT, KH, KW, CIN] in x's dtype.
        coef: [5, CIN] fp32, see `fastres.kernels.tiles`; None: x as it is.
        residual: [N, OH, OW, COUT].
        rank: which of `conv_configs`, the first at 0; the last where there are fewer.
        dilation: pixels from one tap of w to the next, both ways.
        act: what x goes through with ``coef``, one of `fastres.kernels.types.ACTIVATIONS`.
    """
    return _launch(x, w, stride, pad, rank, dilation, coef=coef, residual=residual, moments=moments, act=act)


def conv_bias_act(
    x: Tensor,
    w: Tensor,
    bias: Tensor,
    stride: int,
    pad: Pad,
    residual: Tensor | None = None,
    relu: bool = True,
    rank: int = 0,
    dilation: int = 1,
) -> Tensor:
    """``relu(conv2d(x, w) + bias (+ residual))`` for inference; bias [COUT] fp32, otherwise as `conv`."""
    return _launch(x, w, stride, pad, rank, dilation, bias=bias, residual=residual, relu=relu)[0]


def bn_add_relu_conv(
    y: Tensor,
    coef: Tensor,
    shortcut: Tensor | None,
    shortcut_coef: Tensor | None,
    w: Tensor,
    moments: bool = True,
    rank: int = 0,
) -> tuple[Tensor, Tensor, Moments | None]:
    """The end of a block and the pointwise convolution that opens the next: ``out = relu(bn(y) + shortcut)``,
    conv(out).

    Args:
        y, shortcut: [N, H, W, CIN]. coef, shortcut_coef: see `fastres.kernels.bn_add_relu.bn_add_relu`.
        w: [COUT, 1, 1, CIN] in y's dtype.
        rank: see `conv`.

    Returns:
        out [N, H, W, CIN], its convolution [N, H, W, COUT] and the statistics of that.
    """
    out = buffers.empty(y, *y.shape)
    pad = (0, 0, 0, 0)
    joined = dict(shortcut=shortcut, shortcut_coef=shortcut_coef, out=out)
    return out, *_launch(y, w, 1, pad, rank, coef=coef, moments=moments, **joined)


@falling_back
def _launch(
    x: Tensor,
    w: Tensor,
    stride: int,
    pad: Pad,
    rank: int,
    dilation: int = 1,
    coef: Tensor | None = None,
    shortcut: Tensor | None = None,
    shortcut_coef: Tensor | None = None,
    out: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
    moments: bool = False,
    act: str = "relu",
) -> tuple[Tensor, Moments | None]:
    n, height, width, cin = x.shape
    cout, kh, kw, _ = w.shape
    out_height, out_width = output_hw((height, width), (kh, kw), stride, pad, dilation)
    rows, flat = n * out_height * out_width, cin < LEAST
    depth = kh * kw * cin if flat else cin
    demand = Demand(
        kernel="conv_kernel",
        device=x.device,
        dtype=x.dtype,
        rows=1 if shortcut is None else 2,
        columns=1,
        vectors=2 * ((coef is not None) + (shortcut_coef is not None)),
        made_rows=coef is not None,
        made_columns=False,
        depth=kh * kw * cin,
    )
    taps = 1 if flat else kh * kw
    product = Product(
        rows=rows,
        columns=cout,
        depth=depth,
        dtype=x.dtype,
        arch=architecture(x.device),
        taps=taps,
        loaded=demand.rows,
        made=demand.made_rows,
        flat=flat,
        least_registers=MORE_REGISTERS if act == "gelu" and coef is not None else 0,
    )
    if (bias, residual, shortcut) == (None,) * 3:  # what may be left to a kernel of its own comes first
        if coef is None and is_stem(cin, cout, (kh, kw), stride, dilation, x.dtype, product.arch):
            if rank == 0:
                return conv_stem(x, w, pad, moments)
            rank -= 1
        held = len(resident_configs(product)) if stride == 1 and not any(pad) else 0
        if rank < held:
            return conv_resident(x, w, coef, moments, product, rank)
        rank -= held
    config = at_rank(conv_configs(product), rank, fitting(demand))
    tiles = cdiv(rows, config.block_m)
    y = buffers.empty(x, n, out_height, out_width, cout)
    made = buffers.moments(x, tiles, cout) if moments else None
    count, mean, m2 = made or (None, None, None)
    # Training's images are of one size or few, as its weight gradients have it. A pointwise kernel reads none.
    sized = moments and not (stride == 1 and is_pointwise((kh, kw), pad))
    sizes = (height, width, out_height, out_width) if sized else None
    launch(
        conv_kernel,
        (tiles * cdiv(cout, config.block_n),),
        x_ptr=x,
        w_ptr=w,
        y_ptr=y,
        coef_ptr=coef,
        shortcut_ptr=shortcut,
        shortcut_coef_ptr=shortcut_coef,
        out_ptr=out,
        bias_ptr=bias,
        residual_ptr=residual,
        count_ptr=count,
        mean_ptr=mean,
        m2_ptr=m2,
        H=height,
        W=width,
        OH=out_height,
        OW=out_width,
        M=rows,
        k_blocks=cdiv(depth, config.block_k) * taps,
        SIZES=sizes,
        CIN=cin,
        COUT=cout,
        KH=kh,
        KW=kw,
        STRIDE=stride,
        TOP=pad[0],
        LEFT=pad[1],
        DILATION=dilation,
        FLAT=flat,
        RELU=relu,
        GELU=act == "gelu",
        PRECISION=precision(x.dtype),
        **config.launch,
    )
    return y, made
