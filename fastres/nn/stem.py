"""The stem: convolution, BatchNorm, ReLU or GELU, and perhaps a max-pool."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastres.nn.blocks import fused_residual
from fastres.nn.bypass import pool_reason, say_once, unsupported, watched
from fastres.nn.norm import conv_of, layer_of, to_nchw, to_nhwc, track
from fastres.nn.roles import IDENTITIES, window_of
from fastres.ops import Layer, Norm, residual_chain, stem
from fastres.ops.layers import output_hw
from fastres.ops.plain import activated


def fused_stem(x: Tensor, conv: Any, bn: Any, pool: nn.Module | None, act: str = "relu") -> Tensor:
    """``pool(relu(bn(conv(x))))`` or ``gelu(pool(bn(conv(x))))``, and the update of the running statistics.

    Pool None or identity: no pool. What may not be bypassed is called.
    """
    reason = unsupported(conv, bn, rectified=act == "relu")
    if reason is not None:
        say_once(conv, reason, "the eager forward of a stem")
    if reason is not None or watched(x):
        return _pooled(bn(conv(x)), pool, act)
    if pool is None or isinstance(pool, nn.Identity) and IDENTITIES.reason(pool) is None:
        return fused_residual(x, [[(conv, bn)]], residual=False, act=act)
    nhwc = to_nhwc(x)
    layer = layer_of(conv, bn, nhwc.shape[1:3], act)
    hw = output_hw(nhwc.shape[1:3], conv.kernel_size, layer.stride, layer.pad, layer.dilation)
    window = None if pool_reason(pool) is not None else window_of(pool, hw)
    if window is None:
        return _pooled(fused_residual(x, [[(conv, bn)]], residual=False, relu=False), pool, act)
    out, statistics = stem(nhwc, layer, *window)
    track([bn], [statistics])
    return to_nchw(out)


def _pooled(y: Tensor, pool: nn.Module | None, act: str) -> Tensor:
    if act == "gelu" and pool is not None:
        return activated(pool(y), act)
    y = activated(y, act)
    return y if pool is None else pool(y)


def fused_biased_conv(x: Tensor, conv: Any, act: str = "relu") -> Tensor:
    """The activation of a convolution with bias, to the operations a frozen BatchNorm of mean 0 and variance 1."""
    nhwc = to_nhwc(x)
    weight, stride, pad, dilation = conv_of(conv, nhwc.shape[1:3])
    zeros = conv.bias.new_zeros(conv.out_channels)
    norm = Norm(None, conv.bias, zeros, zeros + 1, eps=0.0, act=act)
    return to_nchw(residual_chain(nhwc, [[Layer(weight, norm, stride, pad, dilation)]])[0])
