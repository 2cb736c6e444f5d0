"""Every primitive of the fused schedules in plain ATen: the CPU's implementation and the oracle of the Triton kernels.

Signatures, layouts and results are those of ``fastres.kernels``: activations NHWC, weights ``[Cout, KH, KW, Cin]``,
statistics fp32, or fp64 for fp64 activations. The elementwise passes are ATen's channels-last BatchNorm loops, which
are vectorised over channels and take half-precision activations with fp32 coefficients: ``batch_norm`` in evaluation
mode with mean 0, variance 1 and epsilon 0 is exactly ``x * scale + shift``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.kernels.buffers import filled, indices
from fastres.kernels.types import Moments
from fastres.ops.library import LibraryConvolutions, add_shortcut, nchw, nhwc

MEAN, VAR, RSTD, SCALE, SHIFT = range(5)
# ATen's channels-last loops sum in fp32, pixel after pixel. On a CPU tiles keep those sums short and so accurate, and
# the second pass in the cache; as many pixels as fit this width count as channels of their own, which costs nothing.
_TILE_BYTES, _TILE_ROWS, _TILE_WIDTH = 1024 * 1024, 128, 2048

_aten = torch.ops.aten


def statistics_dtype(activations: torch.dtype) -> torch.dtype:
    """fp32, but fp64 for fp64 activations."""
    return torch.float64 if activations == torch.float64 else torch.float32


def moments(y: Tensor) -> Moments:
    """Per-channel statistics of y [N, H, W, C] by M-tiles (one tile on a GPU), two passes over each tile."""
    tiles, fold = _tiles(y)
    unused = filled(y, 0, 2, fold * y.shape[3], dtype=statistics_dtype(y.dtype))
    pairs = [torch.batch_norm_update_stats(tile, *unused, 0.0) for tile in tiles]
    mean, var = (torch.stack(part).view(-1, y.shape[3]) for part in zip(*pairs))
    count = filled(unused, tiles[0].shape[2], len(tiles) * fold)
    count[-fold:] = tiles[-1].shape[2]
    return Moments(count, mean, var * count[:, None])


def finalize(moments: Moments, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
    """Merge the tiles (Chan et al. 1979) in fp64; coefficients [5, C]: mean, biased variance, rstd, scale, shift."""
    count, mean, m2 = (part.double() for part in moments)
    total = count.sum()
    merged = (count[:, None] * mean).sum(0) / total
    var = (m2 + count[:, None] * (mean - merged).square()).sum(0) / total
    return coefficients_of(merged, var, gamma, beta, eps, moments.mean.dtype)


def running_coef(
    running_mean: Tensor, running_var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> Tensor:
    """Coefficients [5, C] of a BatchNorm that normalises by its running statistics."""
    return coefficients_of(
        running_mean.double(), running_var.double(), gamma, beta, eps, statistics_dtype(running_mean.dtype)
    )


def coefficients_of(
    mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    """Coefficients [5, C] in ``dtype`` from the mean and the biased variance in fp64."""
    rstd = torch.rsqrt(var + eps)
    scale = rstd if gamma is None else rstd * gamma
    shift = -mean * scale if beta is None else beta - mean * scale
    return torch.stack([mean, var, rstd, scale, shift]).to(dtype)


def bn_add_relu(
    y: Tensor,
    coef: Tensor,
    shortcut: Tensor | None = None,
    shortcut_coef: Tensor | None = None,
    relu: bool = True,
    shortcut_stride: int = 1,
) -> Tensor:
    """``relu(y*scale + shift + shortcut)``, the shortcut normalised by its own coefficients where it has some.

    The shortcut is like y, or every ``shortcut_stride``-th pixel of it is added to as many of the first channels as it
    has.
    """
    out = _affine(y, coef[SCALE], coef[SHIFT])
    if shortcut is not None:
        if shortcut_coef is not None:
            shortcut = _affine(shortcut, shortcut_coef[SCALE], shortcut_coef[SHIFT])
        add_shortcut(out, shortcut, shortcut_stride)
    return out.relu_() if relu else out


def bn_add_relu_backward(
    dout: Tensor,
    out: Tensor | None,
    y: Tensor,
    coef: Tensor,
    shortcut: Tensor | None = None,
    shortcut_coef: Tensor | None = None,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``dz = dout * (out > 0)`` (out None: no ReLU, a copy) with the sums of y's and of the shortcut's BatchNorm.

    ``in_place``: dz takes dout's memory.
    """
    if out is None:
        dz = dout if in_place else dout.clone()
    elif in_place:
        dz = _aten.threshold_backward.grad_input(dout, out, 0, grad_input=dout)
    else:
        dz = _aten.threshold_backward(dout, out, 0)
    shortcut_sums = None if shortcut is None or shortcut_coef is None else bn_sums(dz, shortcut, shortcut_coef)
    return dz, bn_sums(dz, y, coef), shortcut_sums


def bn_sums(dz: Tensor, y: Tensor, coef: Tensor) -> Tensor:
    """``[T, 2, C]``: the sums over each M-tile of dz and of dz * xhat, in one pass."""
    (dz_tiles, fold), (y_tiles, _) = _tiles(dz), _tiles(y)
    mean, rstd = coef[MEAN].repeat(fold), coef[RSTD].repeat(fold)
    ones, sums = torch.ones_like(mean), []
    for dz_tile, y_tile in zip(dz_tiles, y_tiles):
        _, scaled, plain = _aten.native_batch_norm_backward(
            dz_tile, y_tile, ones, None, None, mean, rstd, True, 0.0, [False, True, True]
        )
        sums.append(torch.stack([plain.view(fold, -1), scaled.view(fold, -1)], dim=1))
    return torch.cat(sums)


def bn_backward_coef(
    sums: Tensor, coef: Tensor, gamma: Tensor | None, count: int, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """BatchNorm's backward as ``dy = A*dz + B*y + C``; and the gradients of gamma and beta, fp32.

    From ``dy = scale * (dz - mean(dz) - xhat * mean(dz*xhat))`` and ``xhat = (y - mean) * rstd``.
    """
    dbeta, dgamma = sums.sum(0)
    if training:
        b = -coef[SCALE] * coef[RSTD] * dgamma / count
        c = -coef[SCALE] * dbeta / count - b * coef[MEAN]
    else:
        b = c = torch.zeros_like(dbeta)
    return torch.stack([coef[SCALE], b, c]), dgamma.clone(), dbeta.clone()


def bn_backward_apply(dz: Tensor, y: Tensor | None, abc: Tensor, residual: Tensor | None = None) -> Tensor:
    """``A*dz + B*y + C (+ residual)``; y None: B and C are 0, and ``0*y`` is not NaN where y is not finite.

    Rounded once: the sum over the pixels is 0 but for rounding, and one of C would be the same at every pixel.
    """
    if y is None:
        dy = _affine(dz, abc[0], torch.zeros_like(abc[0]))
        return dy if residual is None else dy.add_(residual)
    dy = torch.addcmul(abc[2], y, abc[1]).addcmul_(dz, abc[0])
    return (dy if residual is None else dy.add_(residual)).to(dz.dtype)


def bn_relu_max_pool(
    y: Tensor, coef: Tensor, kernel: int, stride: int, pad: tuple[int, int, int, int]
) -> tuple[Tensor, Tensor]:
    """Max-pool of ``relu(y*scale + shift)``; index uint8: the winning tap, row by row, the first among equals."""
    height, width = y.shape[1:3]
    top, left, bottom, right = pad
    a = F.pad(bn_add_relu(y, coef), (0, 0, left, right, top, bottom), value=-float("inf"))
    out, flat = F.max_pool2d(nchw(a), kernel, stride, return_indices=True)
    padded_width = left + width + right
    rows = indices(y, out.shape[2])[:, None] * stride
    columns = indices(y, out.shape[3]) * stride
    tap = (flat // padded_width - rows) * kernel + flat % padded_width - columns
    return nhwc(out), nhwc(tap.to(torch.uint8))


def bn_relu_max_pool_backward(
    dout: Tensor, index: Tensor, y: Tensor, coef: Tensor, kernel: int, stride: int, pad: tuple[int, int, int, int]
) -> tuple[Tensor, Tensor]:
    """Gradient at BatchNorm's output, masked by the ReLU, and BatchNorm's sums.

    A pixel sums the windows that it won, in the accumulators' precision and in a fixed order of the taps.
    """
    (n, height, width, channels), (_, out_height, out_width, _) = y.shape, dout.shape
    top, left, _, _ = pad
    padded = filled(
        y,
        0,
        n,
        max(height + top, (out_height - 1) * stride + kernel),
        max(width + left, (out_width - 1) * stride + kernel),
        channels,
        dtype=statistics_dtype(y.dtype),
    )
    for tap in range(kernel * kernel):
        rows = slice(tap // kernel, tap // kernel + (out_height - 1) * stride + 1, stride)
        columns = slice(tap % kernel, tap % kernel + (out_width - 1) * stride + 1, stride)
        padded[:, rows, columns] += torch.where(index == tap, dout, 0)  # not a product: 0 times inf is NaN
    grad = padded[:, top : top + height, left : left + width].to(y.dtype)
    dz = _aten.threshold_backward(grad.contiguous(), bn_add_relu(y, coef), 0)
    return dz, bn_sums(dz, y, coef)


def global_avg_pool(x: Tensor) -> Tensor:
    """Mean over the pixels, [N, C] in x's dtype."""
    return x.mean((1, 2), dtype=statistics_dtype(x.dtype)).to(x.dtype)


def global_avg_pool_backward(dout: Tensor, hw: tuple[int, int]) -> Tensor:
    """Each pixel's share of dout [N, C], as [N, H, W, C]."""
    height, width = hw
    share = (dout / (height * width))[:, None, None]
    return share.expand(-1, height, width, -1).contiguous()


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    zeros, ones = torch.zeros_like(scale), torch.ones_like(scale)
    return nhwc(_aten.native_batch_norm(nchw(x), scale, shift, zeros, ones, False, 0.0, 0.0)[0])


def _tiles(y: Tensor) -> tuple[tuple[Tensor, ...], int]:
    """M-tiles of y [N, H, W, C], each a channels-last [1, fold*C, rows, 1], and fold; on a GPU one tile, fold 1."""
    pixels, channels = y.numel() // y.shape[3], y.shape[3]
    size, fold = pixels, 1
    if y.device.type == "cpu":
        while pixels % (2 * fold) == 0 and 2 * fold * channels <= _TILE_WIDTH and pixels // fold > _TILE_ROWS:
            fold *= 2
        size = min(_TILE_ROWS, max(1, _TILE_BYTES // (fold * channels * y.element_size())))
    rows = y.reshape(pixels // fold, fold * channels)
    return rows.t()[None, :, :, None].split(size, dim=2), fold


_convolutions = LibraryConvolutions(moments, bn_add_relu, bn_backward_apply, bn_sums)
conv = _convolutions.conv
bn_add_relu_conv = _convolutions.bn_add_relu_conv
conv_dgrad = _convolutions.conv_dgrad
conv_wgrad = _convolutions.conv_wgrad
conv_backward = _convolutions.conv_backward
conv_bias_act = _convolutions.conv_bias_act
