"""The convolution primitives: in bf16 our own, see `fastres.ops.cpu.tiles`, where the CPU multiplies it; else PyTorch's
convolution over parts of the batch, the passes around it while a part is in cache.

A part's normalised input, its convolution output and the gradient in front of BatchNorm exist for that part only: they
are made, read and forgotten in the last-level cache, so that memory sees what the fused GPU kernels' memory sees. The
statistics are of the whole batch; they are merged, see `fastres.ops.cpu.passes.finalize`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastres.kernels.types import Moments
from fastres.ops.backends.protocol import Activation, Convolution, Gradient, Normalised, Shortcut
from fastres.ops.backends.vendor import VendorConvolutions, add_gradient, nchw, nhwc, padded
from fastres.ops.cpu import onednn, passes, products, tiles

# What one part's tensors may take of the last-level cache, and the weights' share of them up to which parts pay: each
# part reads and reorders the weights again.
PART_BYTES, WEIGHTS_SHARE = 16 * 2**20, 8


class PartedConvolutions(VendorConvolutions):
    """The convolution primitives by our own tiles in bf16, else over parts of the batch.

    See `fastres.ops.backends.protocol.Backend`.
    """

    def rounds_weights(self, dtype: torch.dtype) -> bool:
        return tiles.takes(dtype)

    def conv(
        self, activation: Activation, conv: Convolution, residual: Tensor | None = None, moments: bool = True
    ) -> tuple[Tensor, Moments | None]:
        (x, coef, act), (w, stride, pad, dilation) = activation, conv
        if tiles.takes(x.dtype):
            return tiles.conv(x, w, stride, pad, dilation, coef, residual, moments, act=act)
        output = _Output(x, conv, moments)
        for images in output.parts:
            a = x[images] if coef is None else passes.bn_add_relu(x[images], coef, act=act)
            output.take(images, products.forward(a, conv, output.at(images)), residual)
        return output.result()

    def conv_bias_act(
        self, x: Tensor, conv: Convolution, bias: Tensor, residual: Tensor | None = None, relu: bool = True
    ) -> Tensor:
        """With PyTorch's convolutions the addition is in oneDNN's call where PyTorch has it."""
        weight, stride, pad, dilation = conv
        if tiles.takes(x.dtype):
            problem = tiles.sizes(x.shape, weight.shape, stride, pad, dilation)
            return tiles.folded_conv(x, tiles.packed(weight, problem), problem, bias.float(), residual, relu)
        if residual is None or not onednn.takes(x.dtype):
            return super().conv_bias_act(x, conv, bias, residual, relu)
        x, padding = padded(x, pad)
        geometry = stride, padding, dilation
        return nhwc(onednn.conv_bias_act(nchw(x), nchw(weight), bias.to(x.dtype), *geometry, nchw(residual), relu))

    def bn_add_relu_conv(
        self, normalised: Normalised, shortcut: Shortcut | None, weight: Tensor, moments: bool = True
    ) -> tuple[Tensor, Tensor, Moments | None]:
        y, coef, _ = normalised
        added, added_coef, _ = shortcut or (None, None, 1)
        out, pad = torch.empty_like(y), (0, 0, 0, 0)
        if tiles.takes(y.dtype):
            return out, *tiles.conv(
                y, weight, 1, pad, 1, coef, None, moments, shortcut=added, shortcut_coef=added_coef, out=out
            )
        output = _Output(out, Convolution(weight), moments)
        for images in output.parts:
            a = passes.store_bn_add_relu(y[images], coef, _at(added, images), added_coef, "relu", out[images])
            output.take(images, products.forward(a, Convolution(weight), output.at(images)))
        return out, *output.result()

    def conv_backward(
        self,
        gradient: Gradient,
        activation: Activation,
        conv: Convolution,
        joined: Shortcut | None = None,
        end: Normalised | None = None,
        need_dx: bool = True,
        need_dw: bool = True,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if not need_dx and not need_dw:
            return None, None, None
        if not tiles.takes(gradient.dz.dtype):
            return _parted_backward(gradient, activation, conv, joined, end, need_dx, need_dw)
        dx = sums = dw = None
        (x, coef, act), (dz, y, abc) = activation, gradient
        if need_dw and tiles.takes_weight_grad(x, coef, conv.dilation):
            problem = tiles.sizes(x.shape, conv.weight.shape, *conv[1:])
            dw = tiles.weight_grad(x, coef, dz, y, abc, problem, act)
        elif need_dw:
            rounded = conv._replace(weight=conv.weight.to(dz.dtype))
            dw = _parted_backward(gradient, activation, rounded, need_dx=False)[2]
        if need_dx:  # last, as it may be written over the gradient that came in
            dx, sums = _tiled_data_grad(gradient, activation, conv, joined, end)
        return dx, sums, dw


def _tiled_data_grad(
    gradient: Gradient, activation: Activation, conv: Convolution, joined: Shortcut | None, end: Normalised | None
) -> tuple[Tensor, Tensor | None]:
    """dx and the sums of `conv_backward` by our own tiles."""
    (x, coef, act), (dz, y, abc), w = activation, gradient, conv.weight
    problem = tiles.sizes(x.shape, w.shape, *conv[1:])
    below = (end and end[:2]) if coef is None else (x, coef)
    if joined is not None and (joined.stride > 1 or joined.tensor.shape != x.shape):
        dx, _ = tiles.data_grad(dz, y, abc, w, problem)
        passes.add_gradient(dx, joined.tensor, joined.stride)
        if below is None:
            return dx, None
        sums = passes.new_sums(dx)
        passes.store_relu_backward(dx, None, x, coef, below, dx, sums, act)
        return dx, sums
    mask, mask_coef = (None, None) if below is None else (x, coef)
    if joined is None:
        return tiles.data_grad(dz, y, abc, w, problem, None, mask, mask_coef, act=act, below=below)
    added = joined.tensor
    apart = added.untyped_storage().data_ptr() == dz.untyped_storage().data_ptr()  # dz is read until the end
    out = None if apart else added
    dx, reduced = tiles.data_grad(dz, y, abc, w, problem, added, mask, mask_coef, act=act, below=below, out=out)
    return passes.copy(dx, added) if apart else dx, reduced


def _parted_backward(
    gradient: Gradient,
    activation: Activation,
    conv: Convolution,
    joined: Shortcut | None = None,
    end: Normalised | None = None,
    need_dx: bool = True,
    need_dw: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`conv_backward` around PyTorch's convolution."""
    (dz, y, abc), (x, coef, act) = gradient, activation
    below, sums, dw = (end and end[:2]) if coef is None else (x, coef), [], None
    parts = _parts(x, dz, conv.weight)
    in_place = joined is not None and joined.tensor.shape == x.shape and joined.stride == 1
    dx = None
    if need_dx and len(parts) > 1:
        dx = joined.tensor if joined is not None and in_place else dz.new_empty(x.shape)
    for images in parts:
        dy = dx_part = dw_part = None  # those of the part before are free now
        dy = dz[images] if abc is None else passes.bn_backward_apply(dz[images], _at(y, images), abc)
        to = _at(dx, images)
        out = None if in_place else to
        dx_part, dw_part = products.backward(dy, activation._replace(y=x[images]), conv, out, need_dx, need_dw)
        if dw_part is not None:
            dw = dw_part if dw is None else dw.add_(dw_part)
        if dx_part is None:
            continue
        if dx is None or to is None:
            dx = to = dx_part
        added = None
        if joined is not None:
            added = joined.tensor[images]
            if joined.stride > 1 or added.shape[3] != dx_part.shape[3]:
                add_gradient(dx_part, joined._replace(tensor=added))
                added = None
        if below is not None:
            sums.append(passes.new_sums(dx_part))
            of = below[0][images], below[1]
            passes.store_relu_backward(dx_part, added, x[images], coef, of, to, sums[-1], act)
        elif added is not None:
            torch.add(dx_part, added, out=to)
        elif dx_part is not to:
            to.copy_(dx_part)
    return dx, _joined(sums), dw


class _Output:
    """A convolution's output, put together part by part, and its statistics."""

    def __init__(self, x: Tensor, conv: Convolution, moments: bool):
        shape = conv.shape_of(x)
        self.parts = _parts(x, x.new_empty(1).expand(shape), conv.weight)
        self._y: Tensor | None = x.new_empty(shape) if len(self.parts) > 1 else None
        self._moments: list[Moments] | None = [] if moments else None

    def at(self, images: slice) -> Tensor | None:
        """Where a part belongs; None: the only one may be anywhere."""
        return _at(self._y, images)

    def take(self, images: slice, part: Tensor, residual: Tensor | None = None) -> None:
        """Store a part, with the residual's, where it is not in place yet, and reduce it."""
        if self._y is None:
            self._y = part
        added, to = _at(residual, images), self._y[images]
        in_place = part.data_ptr() == to.data_ptr()
        if self._moments is not None:
            self._moments.append(passes.new_moments(part))
            passes.store_moments(part, added, None if in_place and added is None else to, self._moments[-1])
        elif added is not None:
            torch.add(part, added, out=to)
        elif not in_place:
            to.copy_(part)

    def result(self) -> tuple[Tensor, Moments | None]:
        """The output and the statistics, of all parts."""
        assert self._y is not None
        if self._moments is None:
            return self._y, None
        if len(self._moments) == 1:
            return self._y, self._moments[0]
        return self._y, Moments(*map(torch.cat, zip(*self._moments)))


def _joined(sums: list[Tensor]) -> Tensor | None:
    return torch.cat(sums) if len(sums) > 1 else next(iter(sums), None)


def _at(tensor: Tensor | None, images: slice) -> Tensor | None:
    return None if tensor is None else tensor[images]


def _parts(x: Tensor, y: Tensor, w: Tensor) -> list[slice]:
    """Parts of the batch whose input and output fit the cache; the whole where the weights are too large for that."""
    images = x.shape[0]
    size = max(1, PART_BYTES * images // ((x.numel() + y.numel()) * x.element_size()))
    if WEIGHTS_SHARE * w.numel() * w.element_size() > PART_BYTES:
        size = images
    return [slice(first, min(images, first + size)) for first in range(0, images, size)]
