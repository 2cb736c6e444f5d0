"""The stem: convolution, BatchNorm, ReLU and perhaps a max-pool."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastres.nn.blocks import fused_residual
from fastres.nn.bypass import IDENTITIES, pool_reason, say_once, unsupported, watched
from fastres.nn.norm import conv_of, layer_of, to_nchw, to_nhwc, track
from fastres.ops import Layer, Norm, residual_chain, stem
from fastres.ops.layers import Pad, output_hw
from fastres.reference.notebook import SameMaxPool2d, same_padding
from fastres.reference.speed import HalvingPool


def fused_stem(x: Tensor, conv: nn.Module, bn: nn.Module, pool: nn.Module | None) -> Tensor:
    """``pool(relu(bn(conv(x))))`` and the update of the running statistics; pool None or identity: no pool.

    What may not be bypassed is called.
    """
    reason = unsupported(conv, bn, rectified=True)
    if reason is not None:
        say_once(conv, reason, "the eager forward of a stem")
    if reason is not None or watched(x):
        y = F.relu(bn(conv(x)))
        return y if pool is None else pool(y)
    if pool is None or isinstance(pool, nn.Identity) and IDENTITIES.reason(pool) is None:
        return fused_residual(x, [[(conv, bn)]], residual=False)
    if isinstance(pool, HalvingPool) and min(x.shape[2:]) == 1 or pool_reason(pool) is not None:
        return pool(fused_residual(x, [[(conv, bn)]], residual=False))
    nhwc = to_nhwc(x)
    layer = layer_of(conv, bn, tuple(nhwc.shape[1:3]))
    hw = output_hw(tuple(nhwc.shape[1:3]), conv.kernel_size, layer.stride, layer.pad, layer.dilation)
    out, statistics = stem(nhwc, layer, *_pool_geometry(pool, hw))
    track([bn], [statistics])
    return to_nchw(out)


def fused_conv_relu(x: Tensor, conv: nn.Module) -> Tensor:
    """``relu(conv(x))`` of a convolution with bias, to the operations a frozen BatchNorm of mean 0 and variance 1."""
    nhwc = to_nhwc(x)
    weight, *geometry = conv_of(conv, tuple(nhwc.shape[1:3]))
    zeros = conv.bias.new_zeros(conv.out_channels)
    norm = Norm(None, conv.bias, zeros, zeros + 1, eps=0.0)
    return to_nchw(residual_chain(nhwc, [[Layer(weight, norm, *geometry)]])[0])


def _pool_geometry(pool: nn.Module, hw: tuple[int, int]) -> tuple[int, int, Pad]:
    """Kernel, stride and padding of a pool over ``hw``."""
    if isinstance(pool, SameMaxPool2d):
        rows, columns = (same_padding(size, pool.kernel, pool.stride) for size in hw)
        return pool.kernel, pool.stride, (rows[0], columns[0], rows[1], columns[1])
    kernel, stride, padding = (
        size if isinstance(size, int) else size[0] for size in (pool.kernel_size, pool.stride, pool.padding)
    )
    return kernel, stride, (padding,) * 4
