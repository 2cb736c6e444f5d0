"""Every primitive in PyTorch's own functions: what runs anywhere, and the oracle of the other backends.

The passes are ATen's channels-last BatchNorm loops, which are vectorised over channels and take half-precision
activations with fp32 coefficients: ``batch_norm`` in evaluation mode with mean 0, variance 1 and epsilon 0 is exactly
``x * scale + shift``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.kernels.buffers import filled, indices
from fastres.kernels.types import Moments
from fastres.ops.backends.protocol import (
    MEAN,
    RSTD,
    SCALE,
    SHIFT,
    Gradient,
    Normalised,
    Shortcut,
    Window,
    statistics_dtype,
)
from fastres.ops.backends.vendor import VendorConvolutions, add_shortcut, nchw, nhwc

# ATen's channels-last loops sum in fp32, pixel after pixel. On a CPU tiles keep those sums short and so accurate, and
# the second pass in the cache; as many pixels as fit this width count as channels of their own, which costs nothing.
_TILE_BYTES, _TILE_ROWS, _TILE_WIDTH = 1024 * 1024, 128, 2048

_aten = torch.ops.aten


class Aten(VendorConvolutions):
    """See `fastres.ops.backends.protocol.Backend` for each method."""

    name = "aten"

    def moments(self, y: Tensor) -> Moments:
        """In M-tiles (one tile on a GPU), two passes over each tile."""
        tiles, fold = pixel_tiles(y)
        unused = filled(y, 0, 2, fold * y.shape[3], dtype=statistics_dtype(y.dtype))
        pairs = [torch.batch_norm_update_stats(tile, unused[0], unused[1], 0.0) for tile in tiles]
        mean, var = (torch.stack(part).view(-1, y.shape[3]) for part in zip(*pairs))
        count = filled(unused, tiles[0].shape[2], len(tiles) * fold)
        count[-fold:] = tiles[-1].shape[2]
        return Moments(count, mean, var * count[:, None])

    def finalize(self, moments: Moments, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
        """In fp64."""
        count, mean, m2 = (part.double() for part in moments)
        total = count.sum()
        merged = (count[:, None] * mean).sum(0) / total
        var = (m2 + count[:, None] * (mean - merged).square()).sum(0) / total
        return coefficients_of(merged, var, gamma, beta, eps, moments.mean.dtype)

    def running_coef(
        self, running_mean: Tensor, running_var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
    ) -> Tensor:
        """In fp64."""
        dtype = statistics_dtype(running_mean.dtype)
        return coefficients_of(running_mean.double(), running_var.double(), gamma, beta, eps, dtype)

    def bn_backward_coef(self, sums: Tensor, coef: Tensor, count: int, training: bool) -> tuple[Tensor, Tensor, Tensor]:
        """From ``dy = scale * (dz - mean(dz) - xhat * mean(dz*xhat))`` and ``xhat = (y - mean) * rstd``."""
        dbeta, dgamma = sums.sum(0)
        if training:
            b = -coef[SCALE] * coef[RSTD] * dgamma / count
            c = -coef[SCALE] * dbeta / count - b * coef[MEAN]
        else:
            b = c = torch.zeros_like(dbeta)
        return torch.stack([coef[SCALE], b, c]), dgamma.clone(), dbeta.clone()

    def bn_add_relu(self, normalised: Normalised, shortcut: Shortcut | None = None, relu: bool = True) -> Tensor:
        out = _affine(normalised.y, normalised.coef)
        if shortcut is not None:
            added = shortcut.tensor if shortcut.coef is None else _affine(shortcut.tensor, shortcut.coef)
            add_shortcut(out, added, shortcut.stride)
        if not relu:
            return out
        return F.gelu(out) if normalised.act == "gelu" else out.relu_()

    def bn_add_relu_backward(
        self,
        dout: Tensor,
        out: Tensor | None,
        normalised: Normalised,
        shortcut: Shortcut | None = None,
        in_place: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if out is None:
            dz = dout if in_place else dout.clone()
        elif normalised.act != "relu":
            dz = _aten.gelu_backward(dout, self.bn_add_relu(normalised, shortcut, relu=False))
        elif in_place:
            dz = _aten.threshold_backward.grad_input(dout, out, 0, grad_input=dout)
        else:
            dz = _aten.threshold_backward(dout, out, 0)
        shortcut_sums = None
        if shortcut is not None and shortcut.coef is not None:
            shortcut_sums = self.bn_sums(dz, Normalised(shortcut.tensor, shortcut.coef))
        return dz, self.bn_sums(dz, normalised), shortcut_sums

    def bn_sums(self, dz: Tensor, normalised: Normalised) -> Tensor:
        """In one pass over each M-tile."""
        y, coef, _ = normalised
        (dz_tiles, fold), (y_tiles, _) = pixel_tiles(dz), pixel_tiles(y)
        mean, rstd = coef[MEAN].repeat(fold), coef[RSTD].repeat(fold)
        ones, sums = torch.ones_like(mean), []
        for dz_tile, y_tile in zip(dz_tiles, y_tiles):
            _, scaled, plain = _aten.native_batch_norm_backward(
                dz_tile, y_tile, ones, None, None, mean, rstd, True, 0.0, [False, True, True]
            )
            sums.append(torch.stack([plain.view(fold, -1), scaled.view(fold, -1)], dim=1))
        return torch.cat(sums)

    def bn_backward_apply(self, gradient: Gradient, residual: Tensor | None = None) -> Tensor:
        """The sum over the pixels is 0 but for rounding, and the rounding of C would be the same at every pixel."""
        dz, y, abc = gradient
        assert abc is not None
        if y is None:
            dy = _scaled(dz, abc[0], torch.zeros_like(abc[0]))
            return dy if residual is None else dy.add_(residual)
        dy = torch.addcmul(abc[2], y, abc[1]).addcmul_(dz, abc[0])
        return (dy if residual is None else dy.add_(residual)).to(dz.dtype)

    def bn_relu_max_pool(self, normalised: Normalised, window: Window) -> tuple[Tensor, Tensor]:
        y = normalised.y
        kernel, stride, (top, left, bottom, right) = window
        width = left + y.shape[2] + right
        gelu = normalised.act == "gelu"
        a = F.pad(self.bn_add_relu(normalised, relu=not gelu), (0, 0, left, right, top, bottom), value=-float("inf"))
        out, flat = F.max_pool2d(nchw(a), kernel, stride, return_indices=True)
        rows = indices(y, out.shape[2])[:, None] * stride
        columns = indices(y, out.shape[3]) * stride
        tap = (flat // width - rows) * kernel + flat % width - columns
        return nhwc(F.gelu(out) if gelu else out), nhwc(tap.to(torch.uint8))

    def bn_relu_max_pool_backward(
        self, dout: Tensor, index: Tensor, normalised: Normalised, window: Window
    ) -> tuple[Tensor, Tensor]:
        """A pixel sums the windows that it won, in the accumulators' precision and in a fixed order of the taps."""
        y = normalised.y
        (n, height, width, channels), (_, out_height, out_width, _) = y.shape, dout.shape
        kernel, stride, (top, left, _, _) = window
        reach = [(size - 1) * stride + kernel for size in (out_height, out_width)]
        padded_hw = max(height + top, reach[0]), max(width + left, reach[1])
        padded = filled(y, 0, n, *padded_hw, channels, dtype=statistics_dtype(y.dtype))
        for tap in range(kernel * kernel):
            rows = slice(tap // kernel, tap // kernel + (out_height - 1) * stride + 1, stride)
            columns = slice(tap % kernel, tap % kernel + (out_width - 1) * stride + 1, stride)
            padded[:, rows, columns] += torch.where(index == tap, dout, 0)  # not a product: 0 times inf is NaN
        grad = padded[:, top : top + height, left : left + width].to(y.dtype)
        dz = self._through(grad.contiguous(), normalised)
        return dz, self.bn_sums(dz, normalised)

    def global_avg_pool(self, x: Tensor) -> Tensor:
        return x.mean((1, 2), dtype=statistics_dtype(x.dtype)).to(x.dtype)

    def global_avg_pool_backward(self, dout: Tensor, hw: tuple[int, int]) -> Tensor:
        height, width = hw
        share = (dout / (height * width))[:, None, None]
        return share.expand(-1, height, width, -1).contiguous()


def coefficients_of(
    mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    """The coefficients [5, C] in ``dtype`` from the mean and the biased variance in fp64."""
    rstd = torch.rsqrt(var + eps)
    scale = rstd if gamma is None else rstd * gamma
    shift = -mean * scale if beta is None else beta - mean * scale
    return torch.stack([mean, var, rstd, scale, shift]).to(dtype)


def pixel_tiles(y: Tensor) -> tuple[tuple[Tensor, ...], int]:
    """M-tiles of y [N, H, W, C], each a channels-last [1, fold*C, rows, 1], and fold; on a GPU one tile, fold 1."""
    pixels, channels = y.numel() // y.shape[3], y.shape[3]
    size, fold = pixels, 1
    if y.device.type == "cpu":
        while pixels % (2 * fold) == 0 and 2 * fold * channels <= _TILE_WIDTH and pixels // fold > _TILE_ROWS:
            fold *= 2
        size = min(_TILE_ROWS, max(1, _TILE_BYTES // (fold * channels * y.element_size())))
    rows = y.reshape(pixels // fold, fold * channels)
    return rows.t()[None, :, :, None].split(size, dim=2), fold


def _affine(x: Tensor, coef: Tensor) -> Tensor:
    return _scaled(x, coef[SCALE], coef[SHIFT])


def _scaled(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    zeros, ones = torch.zeros_like(scale), torch.ones_like(scale)
    return nhwc(_aten.native_batch_norm(nchw(x), scale, shift, zeros, ones, False, 0.0, 0.0)[0])
