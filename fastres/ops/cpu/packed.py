"""Weights in oneDNN's own layout: a convolution reorders plain ones at every call, which is most of a small batch's time."""

from __future__ import annotations

import torch
from torch import Tensor

from fastres.kernels.geometry import Pad
from fastres.ops.cpu import onednn
from fastres.ops.library import nchw, padded

AVAILABLE = onednn.AVAILABLE and hasattr(onednn.mkldnn, "_reorder_convolution_weight")


class PackedWeight:
    """The packed form of one constant weight, for the last shape that it met; packed again where the weight has changed.

    A copy of it starts empty, so that networks are copied and saved without.
    """

    def __init__(self):
        self._key: tuple | None = None
        self._weight: Tensor | None = None
        self._packed: Tensor | None = None

    def of(self, weight: Tensor, x: Tensor, stride: int, padding: list[int]) -> Tensor:
        """The weight in the layout that suits x.

        Args:
            weight: [C', C, KH, KW].
            x: [N, C, H, W].
        """
        key = (weight._version, x.shape, x.dtype, stride, *padding)
        if self._packed is None or weight is not self._weight or key != self._key:
            shape = list(x.shape)
            self._packed = onednn.mkldnn._reorder_convolution_weight(
                weight.to(x.dtype), padding, [stride] * 2, [1, 1], 1, shape
            )
            self._weight, self._key = weight, key
        return self._packed

    def __deepcopy__(self, memo: dict) -> PackedWeight:
        return PackedWeight()

    def __reduce__(self) -> tuple:
        return PackedWeight, ()


@torch.no_grad()
def packed_conv_bias_act(
    x: Tensor,
    weight: Tensor,
    packed: PackedWeight,
    bias: Tensor,
    stride: int,
    pad: Pad,
    residual: Tensor | None = None,
    relu: bool = True,
) -> Tensor:
    """`fastres.ops.aten.conv_bias_act` of the weight [C', C, KH, KW]."""
    x, padding = padded(x, pad)
    return onednn.conv_bias_act(x, packed.of(weight, nchw(x), stride, padding), bias, stride, padding, residual, relu)
