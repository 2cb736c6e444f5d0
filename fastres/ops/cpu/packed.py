"""Inference convolutions that keep what calls share: the weight in oneDNN's own layout, and the checked arguments.

A convolution reorders plain weights at every call, which is most of a small batch's time; looking at the arguments is
most of the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastres.kernels.geometry import Pad
from fastres.ops.backends.vendor import nchw, nhwc, padded
from fastres.ops.cpu import onednn, tiles
from fastres.ops.operation import without_autocast

AVAILABLE = onednn.AVAILABLE and hasattr(onednn.mkldnn, "_reorder_convolution_weight")


def packed_weight(weight: Tensor, x: Tensor, stride: int, padding: list[int], dilation: int = 1) -> Tensor:
    """The weight [C', C, KH, KW] in x's dtype and the layout that suits x [N, C, H, W]."""
    return onednn.mkldnn._reorder_convolution_weight(
        weight.to(x.dtype), padding, [stride] * 2, [dilation] * 2, 1, list(x.shape)
    )


def packs(dtype: torch.dtype) -> bool:
    """Whether weights for activations of this dtype can be packed."""
    return AVAILABLE and onednn.takes(dtype)


Geometry = tuple[int, Pad, int]  # stride, padding, dilation


class _Ready(NamedTuple):
    weight: Tensor
    bias: Tensor
    memory: tuple[Tensor, Tensor]  # theirs, held so that no other tensor gets the same address meanwhile
    geometry: Geometry
    key: tuple
    call: Callable[[Tensor, Tensor | None], Tensor]
    own: Own | None = None


class Own(NamedTuple):
    """A convolution by our own tiles."""

    weights: Tensor  # packed
    bias: Tensor  # in fp32
    shape: tuple[int, ...]  # of the weight [C', KH, KW, C]
    geometry: Geometry
    relu: bool
    output_bytes: int  # of an image

    def __call__(self, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """Of x and residual in NHWC; ``out`` may be the residual's memory."""
        problem = tiles.sizes(tuple(x.shape), self.shape, *self.geometry)
        return tiles.folded_conv(x, self.weights, problem, self.bias, residual, self.relu, out)


class PackedConv:
    """One convolution with constant weight and bias, ready for calls like the last one; made ready again for others.

    So it is after writes in place and for other memory (``.data = ...``). Writes that no version counts, through
    ``.data``, NumPy or shared memory, need `clear`.

    A copy of it starts empty, so that networks are copied and saved without. Threads may share it.
    """

    def __init__(self):
        self._ready: _Ready | None = None

    @property
    def is_ready(self) -> bool:
        """Whether there was a call."""
        return self._ready is not None

    @torch.no_grad()
    def prepare(
        self, x: Tensor, weight: Tensor, bias: Tensor, geometry: Geometry, residual: Tensor | None, relu: bool
    ) -> Tensor:
        """The same as `repeat`, with what is to be prepared for it."""
        stride, pad, dilation = geometry
        whole = nhwc(x)
        inner, padding = padded(whole, pad)
        memory = weight.detach(), bias.detach()
        key = _key(x, weight, bias, residual, relu)
        if tiles.takes(x.dtype):
            own = _own(whole, nhwc(weight.to(x.dtype)), bias, geometry, relu)

            def call_own(x: Tensor, residual: Tensor | None) -> Tensor:
                return nchw(own(nhwc(x), None if residual is None else nhwc(residual)))

            self._ready = _Ready(weight, bias, memory, geometry, key, call_own, own)
            return call_own(x, residual)
        copied, dtype_bias = inner is not whole, bias.to(x.dtype)
        packed = packed_weight(weight, nchw(inner), stride, padding, dilation)

        def call(x: Tensor, residual: Tensor | None) -> Tensor:
            x = nchw(padded(nhwc(x), pad)[0]) if copied else x
            return onednn.conv_bias_act(x, packed, dtype_bias, stride, padding, dilation, residual, relu)

        self._ready = _Ready(weight, bias, memory, geometry, key, call)
        return call(x, residual)

    @torch.no_grad()
    def repeat(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        relu: bool,
        geometry: Geometry | None = None,
    ) -> Tensor | None:
        """The result [N, C', H', W'], in channels-last memory; None where anything differs from the last call.

        Args:
            x, residual: [N, C, H, W] and like the result, in channels-last memory.
            weight, bias: the tensors of the last call.
            geometry: stride, padding and dilation; None: those of the last call.
        """
        ready = self._ready  # looked up once: another thread may replace it
        if ready is None or ready.weight is not weight or ready.bias is not bias:
            return None
        if geometry not in (None, ready.geometry) or ready.key != _key(x, weight, bias, residual, relu):
            return None
        return ready.call(x, residual)

    def own(self, weight: Tensor, bias: Tensor) -> Own | None:
        """What the last call was done by; None where it was not our own tiles, or with other values."""
        ready = self._ready
        if ready is None or ready.weight is not weight or ready.bias is not bias:
            return None
        return ready.own if ready.key[-1] == _constants(weight, bias) else None

    def clear(self) -> None:
        """Prepare anew at the next call; for a weight or bias that was changed where its version does not count it."""
        self._ready = None

    def __deepcopy__(self, memo: dict) -> PackedConv:
        return PackedConv()

    def __reduce__(self) -> tuple:
        return PackedConv, ()


def _own(x: Tensor, weight: Tensor, bias: Tensor, geometry: Geometry, relu: bool) -> Own:
    """Of x and weight in NHWC."""
    problem = tiles.sizes(tuple(x.shape), tuple(weight.shape), *geometry)
    output_bytes = problem[4] * problem[5] * problem[6] * x.element_size()
    packed, float_bias = tiles.packed(weight, problem), bias.float().contiguous()
    return Own(packed, float_bias, tuple(weight.shape), geometry, relu, output_bytes)


def _key(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool) -> tuple:
    """All of a call that its preparation depends on, but for the values of x and of the residual."""
    added = None if residual is None else _form(residual)
    return _form(x), added, relu, _constants(weight, bias)


def _constants(weight: Tensor, bias: Tensor) -> tuple:
    return weight._version, weight.data_ptr(), bias._version, bias.data_ptr()


def _form(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


@without_autocast
def packed_conv_bias_act(
    x: Tensor,
    weight: Tensor,
    packed: PackedConv,
    bias: Tensor,
    geometry: Geometry,
    residual: Tensor | None = None,
    relu: bool = True,
) -> Tensor:
    """`Backend.conv_bias_act` of the weight [C', C, KH, KW]."""
    x, residual = nchw(x), None if residual is None else nchw(residual)
    y = packed.repeat(x, weight, bias, residual, relu, geometry)
    return nhwc(packed.prepare(x, weight, bias, geometry, residual, relu) if y is None else y)
