"""Gradient of a convolution's weight, BatchNorm's backward and BatchNorm with ReLU or GELU in its prologues."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastres.kernels import buffers
from fastres.kernels.configs import (
    LEAST,
    MORE_REGISTERS,
    at_rank,
    light_parts,
    precision,
    splits,
    weight_programs,
    wgrad_configs,
)
from fastres.kernels.dependent import await_inputs
from fastres.kernels.geometry import Pad, cdiv, is_pointwise
from fastres.kernels.launch import launch
from fastres.kernels.parts import total
from fastres.kernels.resources import Demand, architecture, falling_back, fitting
from fastres.kernels.stem import is_stem, wgrad_stem
from fastres.kernels.tiles import SCALE, SHIFT, activate, bn_backward, frozen_bn_backward, repeats, within, zero_outside


@triton.jit
def conv_wgrad_kernel(
    dz_ptr,
    y_ptr,
    abc_ptr,
    x_ptr,
    coef_ptr,
    dw_ptr,
    M,
    steps,
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
    FLAT: tl.constexpr,
    TAPS: tl.constexpr,
    GELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``dw = (A*dz + B*y + C)^T relu(x*scale + shift)``, summed over ``steps`` blocks of pixels: one part of several.

    The product's rows are the COUT channels, its columns the CIN channels of one tap or, where those would not fill a
    tensor core (FLAT), of all taps in a row; it sums over the M = N*OH*OW pixels, BLOCK_K a step. With TAPS = KW a
    program makes the products of a row of taps: dy is made and read once for them. Moves dz, y and x about once for
    each tile of the other one's channels (and taps), mostly from the L2, and a part of dw once.

    Args:
        dz_ptr, y_ptr: [N, OH, OW, COUT]. abc_ptr: [3, COUT] fp32; None: dz is the convolution's gradient. y_ptr: None
            without abc_ptr, and where B and C are 0.
        x_ptr: [N, H, W, CIN]. coef_ptr: [5, CIN] fp32 or None: x as it is. GELU: in place of ReLU.
        dw_ptr: [parts, COUT, KH, KW, CIN] fp32; program (t, s) writes tile t of part s.
        TAPS: products of a program, of as many neighbouring columns of the window: 1 or KW.
    """
    await_inputs()
    POINTWISE: tl.constexpr = KH == 1 and KW == 1 and STRIDE == 1 and TOP == 0 and LEFT == 0
    DEPTH: tl.constexpr = KH * KW * CIN
    COLUMNS: tl.constexpr = DEPTH if FLAT else CIN
    C_TILES: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    N_TILES: tl.constexpr = C_TILES if FLAT else C_TILES * (KH * KW // TAPS)
    # 1. The tile: BLOCK_M channels of the gradient, BLOCK_N of what the convolution read, at TAPS taps or at all.
    o = (tl.program_id(0) // N_TILES) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_ok = within(o, COUT, BLOCK_M)
    n_tile = tl.program_id(0) % N_TILES
    if FLAT:
        n = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        n_ok = n < DEPTH
        c = n % CIN
        kh = (n // CIN // KW * DILATION)[None, :]
        kw = (n // CIN % KW * DILATION)[None, :]
    else:
        tap = n_tile // C_TILES * TAPS
        c = (n_tile % C_TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
        n = tap * CIN + c
        n_ok = within(c, CIN, BLOCK_N)
        kh = tap // KW * DILATION
        kw = tap % KW * DILATION
    # 2. The coefficients of what it read, in registers.
    if coef_ptr is not None:
        scale = tl.load(coef_ptr + SCALE * CIN + c, mask=n_ok, other=0.0)
        shift = tl.load(coef_ptr + SHIFT * CIN + c, mask=n_ok, other=0.0)

    acc = (tl.zeros((BLOCK_M, BLOCK_N), tl.float32),) * TAPS
    repeats(steps)
    for step in range(steps):
        # 3. The convolution's gradient. One factor is 0 for pixels that do not exist: this one if none has padding.
        first = (tl.program_id(1) * steps + step) * BLOCK_K
        row = tl.arange(0, BLOCK_K)
        row_ok = row < M - first
        dz_first = first.to(tl.int64) * COUT
        dz_offset = (row * COUT)[:, None] + o[None, :]
        dz_ok = row_ok[:, None] & o_ok[None, :]
        dy = tl.load(dz_ptr + dz_first + dz_offset, mask=dz_ok, other=0.0)
        if abc_ptr is not None:
            if y_ptr is not None:
                y = tl.load(y_ptr + dz_first + dz_offset, mask=dz_ok, other=0.0)
                wide = bn_backward(dy, y, abc_ptr, o, o_ok, COUT)
            else:
                wide = frozen_bn_backward(dy, abc_ptr, o, o_ok)
            wide = zero_outside(wide, row_ok[:, None])
            dy = wide.to(dy.dtype)
        # 4. Where this step's pixels are in x. Divisors are compiled in.
        if POINTWISE:
            x_first = first.to(tl.int64) * CIN
            offset = (row * CIN)[:, None] + c[None, :]
        else:
            image = first // (OH * OW)
            x_first = image.to(tl.int64) * (H * W * CIN)
            m = first - image * (OH * OW) + row
            h = (m // OW % OH * STRIDE - TOP)[:, None] + kh
            v = (m % OW * STRIDE - LEFT)[:, None] + kw
            h_ok = row_ok[:, None] & (h >= 0) & (h < H)
            offset = (((m // OW // OH) * H)[:, None] + h) * (W * CIN) + v * CIN + c[None, :]
        products = ()  # of the taps
        for place in tl.static_range(TAPS):
            # 5. What the convolution read. Channels that do not exist have coefficients of 0.
            inside = row_ok[:, None]
            if not POINTWISE:
                inside = h_ok & (v + place * DILATION >= 0) & (v + place * DILATION < W)
            a = tl.load(x_ptr + x_first + offset + place * DILATION * CIN, mask=inside & n_ok[None, :], other=0.0)
            if coef_ptr is not None:
                z = a.to(tl.float32) * scale[None, :] + shift[None, :]
                if not POINTWISE:
                    z = zero_outside(z, inside)
                a = activate(z, GELU).to(a.dtype)
            # 6. The product.
            products += (tl.dot(tl.trans(dy), a, acc[place], input_precision=PRECISION),)  # type: ignore[assignment]
        acc = products

    # 7. This part's tile of dw.
    part = tl.program_id(1).to(tl.int64) * (COUT * DEPTH)
    for place in tl.static_range(TAPS):
        columns = (n + place * CIN)[None, :]
        tl.store(dw_ptr + part + (o * DEPTH)[:, None] + columns, acc[place], mask=o_ok[:, None] & n_ok[None, :])


@falling_back
def conv_wgrad(
    dz: Tensor,
    y: Tensor | None,
    abc: Tensor | None,
    x: Tensor,
    coef: Tensor | None,
    stride: int,
    pad: Pad,
    kernel_hw: tuple[int, int],
    rank: int = 0,
    dilation: int = 1,
    act: str = "relu",
) -> Tensor:
    """Gradient of the weight, fp32 [COUT, KH, KW, CIN].

    Args:
        dz, y, abc: see `conv_dgrad`.
        x, coef: what the convolution read: [N, H, W, CIN], and [5, CIN] fp32 where it read ``relu(x*scale + shift)``.
        rank: which of `wgrad_configs`, the first at 0; the last where there are fewer.
        dilation: pixels from one tap of the weight to the next, both ways.
        act: what x goes through with ``coef``, one of `fastres.kernels.types.ACTIVATIONS`.
    """
    n, out_height, out_width, cout = dz.shape
    _, height, width, cin = x.shape
    kh, kw = kernel_hw
    pixels, flat = n * out_height * out_width, cin < LEAST
    columns = kh * kw * cin if flat else cin
    arch = architecture(dz.device)
    if coef is None and is_stem(cin, cout, (kh, kw), stride, dilation, dz.dtype, arch):
        if rank == 0:
            return wgrad_stem(dz, y, abc, x, pad, (kh, kw))
        rank -= 1
    demand = Demand(
        kernel="conv_wgrad_kernel",
        device=dz.device,
        dtype=dz.dtype,
        rows=1 if y is None else 2,
        columns=1,
        vectors=0,
        made_rows=abc is not None,
        made_columns=coef is not None,
        depth=pixels,
    )
    needy = flat or (kh * kw > 1 and y is not None and coef is not None)
    configs = wgrad_configs(
        cout,
        columns,
        pixels,
        dz.dtype,
        least_registers=MORE_REGISTERS if needy else 0,
        arch=arch,
        made=abc is not None,
        flat=flat,
        window=(1, 1) if flat else (kh, kw),
        reads_made=coef is not None,
    )
    config = at_rank(configs, rank, fitting(demand))
    programs = weight_programs(config, cout, columns, (1, 1) if flat else (kh, kw))
    # What it reads of the memory: dz and x, each once.
    light = light_parts(pixels * (cout + cin) * dz.element_size(), cout * kh * kw * cin)
    steps = cdiv(cdiv(pixels, config.block_k), splits(programs, pixels, config, light))
    parts = cdiv(pixels, config.block_k * steps)
    dw = buffers.empty(dz, parts, cout, kh, kw, cin, dtype=torch.float32)
    # A pointwise kernel does not read the sizes: one is compiled for all.
    pointwise = stride == 1 and is_pointwise(kernel_hw, pad)
    sizes = (1, 1, 1, 1) if pointwise else (height, width, out_height, out_width)
    launch(
        conv_wgrad_kernel,
        (programs, parts),
        dz_ptr=dz,
        y_ptr=y,
        abc_ptr=abc,
        x_ptr=x,
        coef_ptr=coef,
        dw_ptr=dw,
        M=pixels,
        steps=steps,
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
        FLAT=flat,
        TAPS=config.taps,
        GELU=act == "gelu",
        PRECISION=precision(dz.dtype),
        **config.launch,
    )
    return total(dw)
