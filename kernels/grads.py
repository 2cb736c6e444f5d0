"""Both gradients of a pointwise convolution in one pass over its pixels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastres.kernels import buffers
from fastres.kernels.configs import at_rank, grads_configs, precision, steps_of
from fastres.kernels.dependent import await_inputs
from fastres.kernels.geometry import cdiv
from fastres.kernels.launch import launch
from fastres.kernels.parts import total
from fastres.kernels.resources import Demand, architecture, falling_back, fitting
from fastres.kernels.tiles import MEAN, SCALE, SHIFT, load_gradient, relu, relu_backward, repeats, store_sums, within


@triton.jit
def conv_grads_kernel(
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
    dw_ptr,
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
    """With ``dy = A*dz + B*y + C`` and the activation ``a = relu(x*scale + shift)`` that the convolution read: ``dx =
    dy w + residual`` through that ReLU, its sums, and ``dw = dy^T a``; of ``steps`` blocks of BLOCK_M pixels and
    BLOCK_N of the CIN channels.

    A program keeps its channels of w, of dw and of the sums, and goes through its pixels: dz, y, x and what else is
    read of them once, where a kernel for each gradient reads dz and y or a stored dy twice, and x. dz and y are read
    once for each block of channels, mostly from the L2, as the programs of the same pixels run at the same time.

    Args:
        dz_ptr, y_ptr: [M, COUT]. abc_ptr: [3, COUT] fp32; None: dz is the convolution's gradient. y_ptr: None without
            abc_ptr, and where B and C are 0.
        w_ptr: [COUT, CIN]. dx_ptr, x_ptr: [M, CIN]. residual_ptr: [M, CIN] or None.
        coef_ptr, sums_ptr: [5, CIN] of the BatchNorm below, whose input is x, and [T, 2, CIN] fp32 for each part's sums
            of dx and dx * xhat; or None: no BatchNorm and no ReLU, the convolution read x.
        mask_ptr: [M, CIN], what the convolution read where it is not ``relu(x*scale + shift)`` but the end of a block;
            or None.
        dw_ptr: [T, COUT, CIN] fp32, a part of the pixels each.
        BLOCK_K: no less than COUT. STAGES: steps in flight.
    """
    await_inputs()
    GROUPS: tl.constexpr = (CIN + BLOCK_N - 1) // BLOCK_N
    part = tl.program_id(0) // GROUPS
    n = (tl.program_id(0) % GROUPS) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_ok = within(n, CIN, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    k_ok = within(k, COUT, BLOCK_K)
    row = tl.arange(0, BLOCK_M)
    # 1. What stays: the weights and the channels' coefficients. Offsets count from the part's first pixel.
    w_offset = (k * CIN)[:, None] + n[None, :]
    w_ok = k_ok[:, None] & n_ok[None, :]
    w = tl.load(w_ptr + w_offset, mask=w_ok, other=0.0)
    if coef_ptr is not None:
        mean = tl.load(coef_ptr + MEAN * CIN + n, mask=n_ok, other=0.0)
        if mask_ptr is None:
            scale = tl.load(coef_ptr + SCALE * CIN + n, mask=n_ok, other=0.0)
            shift = tl.load(coef_ptr + SHIFT * CIN + n, mask=n_ok, other=0.0)
    first = part.to(tl.int64) * (steps * BLOCK_M)
    pixels = tl.minimum(M - first, steps * BLOCK_M).to(tl.int32)
    dz_ptr += first * COUT
    if y_ptr is not None:
        y_ptr += first * COUT
    x_first = first * CIN

    dw = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    sum_dx = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    sum_dx_x = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    repeats(steps)
    for step in tl.range(0, steps, num_stages=STAGES):
        pixel = step * BLOCK_M + row
        row_ok = pixel < pixels
        # 2. The convolution's gradient.
        offset = (pixel * COUT)[:, None] + k[None, :]
        ok = row_ok[:, None] & k_ok[None, :]
        dy = load_gradient(dz_ptr, y_ptr, abc_ptr, offset, ok, row_ok, k, k_ok, COUT)
        # 3. What the convolution read.
        x_offset = (pixel * CIN)[:, None] + n[None, :]
        x_ok = row_ok[:, None] & n_ok[None, :]
        x = tl.load(x_ptr + x_first + x_offset, mask=x_ok, other=0.0)
        a = x
        if coef_ptr is not None:
            if mask_ptr is not None:
                a = tl.load(mask_ptr + x_first + x_offset, mask=x_ok, other=0.0)
            else:
                a = relu(x.to(tl.float32) * scale[None, :] + shift[None, :]).to(x.dtype)
        # 4. The products.
        acc = tl.dot(tl.trans(w), tl.trans(dy), input_precision=PRECISION)
        dw = tl.dot(tl.trans(dy), a, dw, input_precision=PRECISION)
        # 5. The gradient at the input, channels as rows, rounded before the ReLU as `conv_dgrad_kernel` does.
        if residual_ptr is not None:
            acc += tl.trans(tl.load(residual_ptr + x_first + x_offset, mask=x_ok, other=0.0)).to(tl.float32)
        dx = acc.to(dx_ptr.dtype.element_ty).to(tl.float32)
        if coef_ptr is not None:
            x = tl.trans(x).to(tl.float32)
            if mask_ptr is not None:
                dx = relu_backward(dx, tl.trans(a).to(tl.float32))
            else:
                dx = relu_backward(dx, x * scale[:, None] + shift[:, None])
            sum_dx += dx
            sum_dx_x += dx * (x - mean[:, None])
        tl.store(dx_ptr + x_first + tl.trans(x_offset), dx.to(dx_ptr.dtype.element_ty), mask=tl.trans(x_ok))

    # 6. This part's sums and its dw.
    if coef_ptr is not None:
        store_sums(tl.sum(sum_dx, 1), tl.sum(sum_dx_x, 1), coef_ptr, sums_ptr, part, n, n_ok, CIN)
    tl.store(dw_ptr + part.to(tl.int64) * (COUT * CIN) + w_offset, dw, mask=w_ok)


def is_joint(cin: int, cout: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `conv_grads` has a configuration for a pointwise convolution of these channels."""
    return bool(grads_configs(cin, cout, dtype, architecture(device)))


@falling_back
def conv_grads(
    dz: Tensor,
    y: Tensor | None,
    abc: Tensor | None,
    w: Tensor,
    x: Tensor,
    coef: Tensor | None = None,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    rank: int = 0,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of a 1x1 convolution with stride 1 and without padding, at its input and of its weight.

    Args:
        dz, y, abc, residual: see `fastres.kernels.dgrad.conv_dgrad`; dz, y: [N, H, W, COUT], residual: [N, H, W, CIN].
        w: [COUT, 1, 1, CIN] in dz's dtype.
        x: [N, H, W, CIN]: what the convolution read or, with ``coef``, the input of the BatchNorm below.
        coef: [5, CIN] of that BatchNorm, behind which there is a ReLU.
        mask: [N, H, W, CIN]: what the convolution read, where the ReLU came after the addition of a shortcut.
        rank: which of `grads_configs`, the first at 0; the last where there are fewer.

    Returns:
        dx [N, H, W, CIN]; with ``coef`` it goes through the ReLU, and sums [T, 2, CIN] fp32 of it and of dx * xhat by
        parts of the pixels, or else None; dw fp32 [COUT, 1, 1, CIN].

    Raises:
        ValueError: for channels that it has no configuration for, see `is_joint`; for a mask without ``coef``.
    """
    n, height, width, cout = dz.shape
    cin, pixels = w.shape[3], n * height * width
    configs = grads_configs(cin, cout, dz.dtype, architecture(dz.device), coef is not None, mask is not None)
    if not configs:
        raise ValueError(f"no tile holds the gradients of {cin} to {cout} channels in {dz.dtype}: see `is_joint`")
    if mask is not None and coef is None:
        raise ValueError("a mask is the end of a block: it takes the coefficients of the BatchNorm before it")
    demand = Demand(
        kernel="conv_grads_kernel",
        device=dz.device,
        dtype=dz.dtype,
        rows=1 if y is None else 2,
        columns=1,
        vectors=0,
        made_rows=abc is not None,
        made_columns=coef is not None and mask is None,
        depth=pixels,
    )
    config = at_rank(configs, rank, fitting(demand))
    groups = cdiv(cin, config.block_n)
    steps = steps_of(pixels, groups, config)
    parts = cdiv(pixels, config.block_m * steps)
    dx = buffers.empty(dz, n, height, width, cin)
    sums = None if coef is None else buffers.empty(dz, parts, 2, cin, dtype=torch.float32)
    dw = buffers.empty(dz, parts, cout, 1, 1, cin, dtype=torch.float32)
    launch(
        conv_grads_kernel,
        (parts * groups,),
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
        dw_ptr=dw,
        M=pixels,
        steps=steps,
        CIN=cin,
        COUT=cout,
        PRECISION=precision(dz.dtype),
        STAGES=config.num_stages,
        **config.launch,
    )
    return dx, sums, total(dw)
