"""The end of a residual block, ``relu(bn(y) + shortcut)``, and its backward: one pass over memory each."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastres.kernels import buffers
from fastres.kernels.configs import limited
from fastres.kernels.dependent import await_inputs
from fastres.kernels.launch import launch
from fastres.kernels.row_tiles import WARPS, elementwise, reduction
from fastres.kernels.tiles import (
    MEAN,
    activate,
    bn,
    bn_backward,
    frozen_bn_backward,
    gelu_backward,
    relu_backward,
    store_sums,
    subsampled,
    sum_pixels,
)

# Told no limit, Triton 3.6's assembler aims at 48 registers for sm_100 with GELU and spills 8 bytes; it needs 56.
GELU_REGISTERS = 64


@triton.jit(do_not_specialize=["M", "H", "W"])
def bn_add_relu_kernel(
    y_ptr,
    coef_ptr,
    shortcut_ptr,
    shortcut_coef_ptr,
    out_ptr,
    M,
    H,
    W,
    RELU: tl.constexpr,
    GELU: tl.constexpr,
    C: tl.constexpr,
    SHORTCUT_STRIDE: tl.constexpr,
    SHORTCUT_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``out = relu(y*scale + shift + shortcut)``, the shortcut normalised by its own coefficients where it has some.

    Moves y, out and what is added once. With GELU that is the activation.

    Args:
        y_ptr, shortcut_ptr, out_ptr: [M, C]. coef_ptr, shortcut_coef_ptr: [5, C]. The shortcut's may be None.
        SHORTCUT_STRIDE, SHORTCUT_C: None both, or the shortcut is [N, H, W, SHORTCUT_C], of which every
            SHORTCUT_STRIDE-th pixel is added to the first channels.
    """
    await_inputs()
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    row = tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_ok = channel < C
    rows = tl.minimum(M - tl.program_id(0) * BLOCK_M, BLOCK_M)
    ok = (row < rows)[:, None] & channel_ok[None, :]
    offset = (row * C)[:, None] + channel[None, :]
    z = bn(tl.load(y_ptr + first * C + offset, mask=ok, other=0.0), coef_ptr, channel, channel_ok, C)
    if shortcut_ptr is not None:
        if SHORTCUT_STRIDE is None:
            shortcut = tl.load(shortcut_ptr + first * C + offset, mask=ok, other=0.0)
        else:
            pixels = ((H + SHORTCUT_STRIDE - 1) // SHORTCUT_STRIDE) * ((W + SHORTCUT_STRIDE - 1) // SHORTCUT_STRIDE)
            image = first // pixels
            pixel = subsampled((first - image * pixels).to(tl.int32) + row, H, W, SHORTCUT_STRIDE)
            source = shortcut_ptr + image * (H * W * SHORTCUT_C) + (pixel * SHORTCUT_C)[:, None] + channel[None, :]
            shortcut = tl.load(source, mask=ok & (channel < SHORTCUT_C)[None, :], other=0.0)
        if shortcut_coef_ptr is not None:
            z += bn(shortcut, shortcut_coef_ptr, channel, channel_ok, C)
        else:
            z += shortcut.to(tl.float32)
    if RELU:
        z = activate(z, GELU)
    tl.store(out_ptr + first * C + offset, z.to(out_ptr.dtype.element_ty), mask=ok)


def bn_add_relu(
    y: Tensor,
    coef: Tensor,
    shortcut: Tensor | None = None,
    shortcut_coef: Tensor | None = None,
    relu: bool = True,
    shortcut_stride: int = 1,
    act: str = "relu",
) -> Tensor:
    """``relu(y*scale + shift + shortcut)`` [N, H, W, C] in y's dtype.

    Args:
        y: [N, H, W, C].
        coef: [5, C] fp32, see `fastres.kernels.tiles`.
        shortcut: like y; or [N, H', W', C'], of which every ``shortcut_stride``-th pixel, H x W of them, is added to
            the first C' of the channels.
        shortcut_coef: [5, C] fp32: the shortcut is normalised too.
        act: the activation where there is one, of `fastres.kernels.types.ACTIVATIONS`.
    """
    channels = y.shape[3]
    rows = y.numel() // channels
    out = buffers.empty(y, *y.shape)
    split = elementwise(rows, channels)
    strided = None if shortcut is None or shortcut.shape == y.shape else shortcut.shape
    gelu = relu and act == "gelu"
    launch(
        bn_add_relu_kernel,
        split.grid,
        y,
        coef,
        shortcut,
        shortcut_coef,
        out,
        rows,
        strided[1] if strided else 0,
        strided[2] if strided else 0,
        RELU=relu,
        GELU=gelu,
        C=channels,
        SHORTCUT_STRIDE=shortcut_stride if strided else None,
        SHORTCUT_C=strided[3] if strided else None,
        **split.launch,
        **(limited(GELU_REGISTERS) if gelu else {}),
    )
    return out


@triton.jit(do_not_specialize=["M", "tiles"])
def bn_add_relu_backward_kernel(
    dout_ptr,
    out_ptr,
    y_ptr,
    coef_ptr,
    shortcut_ptr,
    shortcut_coef_ptr,
    dz_ptr,
    sums_ptr,
    shortcut_sums_ptr,
    joined_ptr,
    M,
    tiles,
    THROUGH: tl.constexpr,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WARPS: tl.constexpr,
):
    """``dz = (dout + joined) * (out > 0)`` and, over this program's rows, sum(dz) and sum(dz * xhat), with
    ``xhat = (y - mean)*rstd``. The same for the shortcut's BatchNorm.

    Moves dout, what is joined, out, y, the shortcut and dz once.

    Args:
        dout_ptr, y_ptr, dz_ptr: [M, C]. out_ptr: [M, C] or None: no ReLU.
        coef_ptr, sums_ptr: [5, C], [T, 2, C], a row of sums a program.
        shortcut_ptr, shortcut_coef_ptr, shortcut_sums_ptr: [M, C], [5, C], [T, 2, C], or None all three; the first may
            be there alone where THROUGH is given.
        joined_ptr: [M, C], added to dout, or None.
        tiles: tiles of BLOCK_M rows that a program goes through.
        THROUGH: "relu" or "gelu": dz is the sum times its derivative at ``y*scale + shift + shortcut``; without out.
    """
    await_inputs()
    part = tl.program_id(0)
    first = part.to(tl.int64) * (tiles * BLOCK_M)
    rows = M - part * (tiles * BLOCK_M)
    row = tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_ok = channel < C
    mean = tl.load(coef_ptr + MEAN * C + channel, mask=channel_ok, other=0.0)[None, :]
    sum_dz = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    sum_dz_y = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    if shortcut_coef_ptr is not None:
        shortcut_mean = tl.load(shortcut_coef_ptr + MEAN * C + channel, mask=channel_ok, other=0.0)[None, :]
        sum_dz_shortcut = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for tile in range(tiles):
        base = (first + tile * BLOCK_M) * C
        ok = (row < rows - tile * BLOCK_M)[:, None] & channel_ok[None, :]
        offset = (row * C)[:, None] + channel[None, :]
        dz = tl.load(dout_ptr + base + offset, mask=ok, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + base + offset, mask=ok, other=0.0).to(tl.float32)
        if joined_ptr is not None:
            dz += tl.load(joined_ptr + base + offset, mask=ok, other=0.0).to(tl.float32)
        if out_ptr is not None:
            dz = relu_backward(dz, tl.load(out_ptr + base + offset, mask=ok, other=0.0).to(tl.float32))
        if shortcut_ptr is not None:
            shortcut = tl.load(shortcut_ptr + base + offset, mask=ok, other=0.0).to(tl.float32)
        if THROUGH is not None:
            z = bn(y, coef_ptr, channel, channel_ok, C)
            if shortcut_coef_ptr is not None:
                z += bn(shortcut, shortcut_coef_ptr, channel, channel_ok, C)
            elif shortcut_ptr is not None:
                z += shortcut
            dz = gelu_backward(dz, z) if THROUGH == "gelu" else relu_backward(dz, z)
        dz = dz.to(dz_ptr.dtype.element_ty).to(tl.float32)
        tl.store(dz_ptr + base + offset, dz.to(dz_ptr.dtype.element_ty), mask=ok)
        sum_dz += dz
        sum_dz_y += dz * (y - mean)
        if shortcut_coef_ptr is not None:
            sum_dz_shortcut += dz * (shortcut - shortcut_mean)
    BITS: tl.constexpr = dz_ptr.dtype.element_ty.primitive_bitwidth
    of_dz = sum_pixels(tl.trans(sum_dz), BITS, WARPS)
    of_dz_y = sum_pixels(tl.trans(sum_dz_y), BITS, WARPS)
    store_sums(of_dz, of_dz_y, coef_ptr, sums_ptr, part, channel, channel_ok, C)
    if shortcut_coef_ptr is not None:
        of_dz_shortcut = sum_pixels(tl.trans(sum_dz_shortcut), BITS, WARPS)
        store_sums(of_dz, of_dz_shortcut, shortcut_coef_ptr, shortcut_sums_ptr, part, channel, channel_ok, C)


def bn_add_relu_backward(
    dout: Tensor,
    out: Tensor | None,
    y: Tensor,
    coef: Tensor,
    shortcut: Tensor | None = None,
    shortcut_coef: Tensor | None = None,
    in_place: bool = False,
    act: str = "relu",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``dz = dout * (out > 0)`` with the sums of y's and of the shortcut's BatchNorm.

    Args:
        dout, y: [N, H, W, C].
        out: the result of `bn_add_relu`; None: it had no activation, dz is a copy of dout.
        coef: [5, C] fp32.
        shortcut, shortcut_coef: those of `bn_add_relu`; a shortcut that is not normalised has no sums.
        in_place: whether dz takes dout's memory.
        act: where there is an out its activation; the gradient of GELU is of ``y*scale + shift + shortcut``.

    Returns:
        dz [N, H, W, C], the partial sums [T, 2, C] fp32 of dz and dz * xhat, and the shortcut's or None.
    """
    gelu = act == "gelu" and out is not None
    return _backward(
        dout,
        y,
        coef,
        out=None if gelu else out,
        shortcut=None if shortcut_coef is None and not gelu else shortcut,
        shortcut_coef=shortcut_coef,
        in_place=in_place,
        through="gelu" if gelu else None,
    )


def bn_act_backward(
    dout: Tensor,
    y: Tensor,
    coef: Tensor,
    out: Tensor | None = None,
    joined: Tensor | None = None,
    act: str = "relu",
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """``dz = (dout + joined) * act'(y*scale + shift)`` and the sums of y's BatchNorm.

    Args:
        dout, y, joined: [N, H, W, C].
        coef: [5, C] fp32.
        out: where ReLU comes behind the addition of a shortcut: its result, which dz is masked by.
        act: the activation otherwise, one of `fastres.kernels.types.ACTIVATIONS`.
        in_place: whether dz takes dout's memory.

    Returns:
        dz [N, H, W, C] and the partial sums [T, 2, C] fp32 of dz and dz * xhat.
    """
    through = None if out is not None else act
    return _backward(dout, y, coef, out=out, joined=joined, in_place=in_place, through=through)[:2]


def _backward(
    dout: Tensor,
    y: Tensor,
    coef: Tensor,
    *,
    out: Tensor | None = None,
    shortcut: Tensor | None = None,
    shortcut_coef: Tensor | None = None,
    joined: Tensor | None = None,
    in_place: bool,
    through: str | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    channels = y.shape[3]
    rows = y.numel() // channels
    split = reduction(rows, channels)
    dz = dout if in_place else buffers.empty(dout, *dout.shape)
    sums = buffers.empty(coef, split.grid[0], 2, channels)
    shortcut_sums = None if shortcut_coef is None else buffers.empty(coef, split.grid[0], 2, channels)
    launch(
        bn_add_relu_backward_kernel,
        split.grid,
        dout,
        out,
        y,
        coef,
        shortcut,
        shortcut_coef,
        dz,
        sums,
        shortcut_sums,
        joined,
        rows,
        split.tiles,
        THROUGH=through,
        C=channels,
        WARPS=WARPS,
        **split.launch,
    )
    return dz, sums, shortcut_sums


@triton.jit(do_not_specialize=["M"])
def bn_backward_apply_kernel(
    dz_ptr,
    y_ptr,
    abc_ptr,
    residual_ptr,
    dy_ptr,
    M,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``dy = A*dz + B*y + C (+ residual)``. Moves dz, y, the residual and dy once.

    Args:
        dz_ptr, y_ptr, dy_ptr: [M, C]; y_ptr None: B and C are 0. abc_ptr: [3, C]. residual_ptr: [M, C] or None.
    """
    await_inputs()
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    row = tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_ok = channel < C
    rows = tl.minimum(M - tl.program_id(0) * BLOCK_M, BLOCK_M)
    ok = (row < rows)[:, None] & channel_ok[None, :]
    offset = (row * C)[:, None] + channel[None, :]
    dz = tl.load(dz_ptr + first * C + offset, mask=ok, other=0.0)
    if y_ptr is not None:
        y = tl.load(y_ptr + first * C + offset, mask=ok, other=0.0)
        dy = bn_backward(dz, y, abc_ptr, channel, channel_ok, C)
    else:
        dy = frozen_bn_backward(dz, abc_ptr, channel, channel_ok)
    if residual_ptr is not None:
        dy += tl.load(residual_ptr + first * C + offset, mask=ok, other=0.0).to(tl.float32)
    tl.store(dy_ptr + first * C + offset, dy.to(dy_ptr.dtype.element_ty), mask=ok)


def bn_backward_apply(dz: Tensor, y: Tensor | None, abc: Tensor, residual: Tensor | None = None) -> Tensor:
    """``A*dz + B*y + C (+ residual)`` in dz's dtype.

    Args:
        dz, y, residual: [N, H, W, C]; y None: ``A*dz``, as B and C are 0.
        abc: [3, C] fp32, from `bn_backward_coef`.
    """
    channels = dz.shape[3]
    rows = dz.numel() // channels
    dy = buffers.empty(dz, *dz.shape)
    split = elementwise(rows, channels)
    launch(bn_backward_apply_kernel, split.grid, dz, y, abc, residual, dy, rows, C=channels, **split.launch)
    return dy
