"""What `torch.utils.flop_counter.FlopCounterMode` counts for the fused operations: eager PyTorch's own figure.

That is two FLOPs a multiply-add of each convolution, forward, and as many for its gradient at its input and at its
weight. What ``keep="fewer"`` computes again in backward is not counted: the figure is the network's, whatever it keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.utils.flop_counter import register_flop_formula

import fastres.ops.conv_bias_act
import fastres.ops.preact
import fastres.ops.residual
import fastres.ops.stem  # noqa: F401 - the formulas need the operations
from fastres.kernels.geometry import output_hw
from fastres.ops.layers import Shape, dilation_of, pad_of


def counted(name: str) -> Callable:
    """Decorator: register a formula, which is given shapes for tensors, for the operation ``fastres::name``."""
    return register_flop_formula(getattr(torch.ops.fastres, name))


def conv_flops(x: Shape, w: Shape, stride: int, pad: Sequence[int], dilation: int = 1) -> tuple[int, Shape]:
    """FLOPs and the output's shape of the convolution of x [N, H, W, C] with w [Cout, KH, KW, Cin]."""
    out = x[0], *output_hw(tuple(x[1:3]), tuple(w[1:3]), stride, tuple(pad), dilation), w[0]
    return 2 * out[0] * out[1] * out[2] * w[0] * w[1] * w[2] * w[3], out


def layer_flops(
    x: Shape,
    weights: Sequence[Shape],
    strides: Sequence[int],
    pads: Sequence[int],
    projection: bool,
    dilations: Sequence[int] | None = None,
) -> list[int]:
    """FLOPs of each convolution of layers that follow one another; the projection, which is last, is of x."""
    shape, found = x, []
    for i, (w, stride) in enumerate(zip(weights, strides)):
        projected = projection and i == len(weights) - 1
        flops, shape = conv_flops(x if projected else shape, w, stride, pad_of(pads, i), dilation_of(dilations, i))
        found.append(flops)
    return found


@counted("residual_forward")
def residual_forward(
    x, added, weights, norms, depths, strides, pads, eps, steps, identity, projection, relu, recording, keep_all,
    group=None, dilations=None, **_,
):  # fmt: skip
    """See `fastres.ops.residual.residual_forward`."""
    return sum(layer_flops(x, weights, strides, pads, projection, dilations))


@counted("residual_backward")
def residual_backward(
    dout, out, inputs, ys, coefs, weights, gammas, depths, strides, pads, steps, trained, identity, projection, keep_all,
    needs, group=None, dilations=None, **_,
):  # fmt: skip
    """See `fastres.ops.residual.residual_backward`: x's own gradient, and a weight's, only where needed."""
    need_x, _, *need_weights = needs
    readers = {0, len(weights) - 1} if projection else {0}  # of x
    flops = layer_flops(inputs[0], weights, strides, pads, projection, dilations)
    return sum(
        count * ((need_x or i not in readers) + need_weight)
        for i, (count, need_weight) in enumerate(zip(flops, need_weights))
    )


@counted("preact_forward")
def preact_forward(
    x, coef, weights, norms, strides, pads, eps, identity, projection, next_coef, recording, group=None, dilations=None,
    **_,
):  # fmt: skip
    """See `fastres.ops.preact.preact_forward`."""
    return sum(layer_flops(x, weights, strides, pads, projection, dilations))


@counted("preact_backward")
def preact_backward(
    dout, x, ys, coefs, weights, gammas, strides, pads, trained, identity, projection, needs, group=None, dilations=None,
    **_,
):  # fmt: skip
    """See `fastres.ops.preact.preact_backward`."""
    flops = layer_flops(x, weights, strides, pads, projection, dilations)
    return sum(count * (1 + need) for count, need in zip(flops, needs[1:]))


@counted("stem_forward")
def stem_forward(
    x, w, gamma, beta, running_mean, running_var, stride, pad, eps, pool_kernel, pool_stride, pool_pad, group=None,
    dilation=1, **_,
):  # fmt: skip
    """See `fastres.ops.stem.stem_forward`."""
    return conv_flops(x, w, stride, pad, dilation)[0]


@counted("stem_backward")
def stem_backward(
    dout, index, x, y, coef, w, gamma, stride, pad, pool_kernel, pool_stride, pool_pad, trained, need_x, need_weight,
    group=None, dilation=1, **_,
):  # fmt: skip
    """See `fastres.ops.stem.stem_backward`."""
    return conv_flops(x, w, stride, pad, dilation)[0] * (need_x + need_weight)


@counted("conv_bias_act")
def conv_bias_act(x, w, bias, stride, pad, residual, relu, dilation=1, **_):
    """See `fastres.ops.conv_bias_act`."""
    return conv_flops(x, w, stride, pad, dilation)[0]
