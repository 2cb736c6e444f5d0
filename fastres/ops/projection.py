"""Backward of the convolution in a shortcut, whose gradient joins that of the block's first convolution."""

from __future__ import annotations

from torch import Tensor

from fastres.kernels.geometry import Pad, is_pointwise
from fastres.ops.select import Primitives


def projection_backward(
    p: Primitives,
    dz: Tensor,
    y: Tensor | None,
    abc: Tensor | None,
    x: Tensor,
    coef: Tensor | None,
    w: Tensor,
    stride: int,
    pad: Pad,
    need_dx: bool,
    need_dw: bool,
    dilation: int = 1,
) -> tuple[Tensor | None, Tensor | None, int]:
    """dx, dw and the stride of dx, arguments as those of `conv_backward` but that dx goes through no ReLU.

    A strided 1x1 convolution reads every stride-th pixel: dx [N, OH, OW, C] is of those, as the others' is zero.
    """
    pointwise = is_pointwise(w.shape[1:3], pad)
    step = stride if pointwise else 1
    if step == 1 and coef is None:
        dx, _, dw = p.conv_backward(dz, y, abc, x, None, w, stride, pad, None, need_dx, need_dw, dilation=dilation)
        return dx, dw, step
    dx = dw = None
    if need_dx:
        hw = tuple((dz if pointwise else x).shape[1:3])
        dx, _ = p.conv_dgrad(dz, y, abc, w, stride // step, pad, hw, dilation=dilation)
    if need_dw:
        dw = p.conv_wgrad(dz, y, abc, x, coef, stride, pad, tuple(w.shape[1:3]), dilation=dilation)
    return dx, dw, step
