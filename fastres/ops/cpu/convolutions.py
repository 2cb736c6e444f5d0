"""The convolution primitives: in bf16 our own, see `fastres.ops.cpu.tiles`, where the CPU multiplies it; else PyTorch's
convolution over parts of the batch, the passes around it while a part is in cache.

A part's normalised input, its convolution output and the gradient in front of BatchNorm exist for that part only: they
are made, read and forgotten in the last-level cache, so that memory sees what the fused GPU kernels' memory sees. The
statistics are of the whole batch; they are merged, see `fastres.ops.cpu.passes.finalize`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastres.kernels.geometry import Pad, output_hw
from fastres.kernels.types import Moments
from fastres.ops.cpu import onednn, passes, products, tiles
from fastres.ops.library import LibraryConvolutions, add_residual, nchw, nhwc, padded

# What one part's tensors may take of the last-level cache, and the weights' share of them up to which parts pay: each
# part reads and reorders the weights again.
PART_BYTES, WEIGHTS_SHARE = 16 * 2**20, 8


class PartedConvolutions(LibraryConvolutions):
    """The convolution primitives over parts of the batch."""

    def __init__(self):
        super().__init__(passes.moments, passes.bn_add_relu, passes.bn_backward_apply, passes.bn_sums)

    def conv(
        self,
        x: Tensor,
        w: Tensor,
        stride: int,
        pad: Pad,
        coef: Tensor | None = None,
        residual: Tensor | None = None,
        moments: bool = True,
        dilation: int = 1,
    ) -> tuple[Tensor, Moments | None]:
        """``y = conv2d(relu(x*scale + shift), w) (+ residual)`` and the statistics of y."""
        if tiles.takes(x.dtype):
            return tiles.conv(x, w, stride, pad, dilation, coef, residual, moments)
        output = _Output(x, w, stride, pad, moments, dilation)
        for images in output.parts:
            a = x[images] if coef is None else passes.bn_add_relu(x[images], coef)
            output.take(images, products.forward(a, w, stride, pad, output.at(images), dilation), residual)
        return output.result()

    def conv_bias_act(
        self,
        x: Tensor,
        w: Tensor,
        bias: Tensor,
        stride: int,
        pad: Pad,
        residual: Tensor | None = None,
        relu: bool = True,
        dilation: int = 1,
    ) -> Tensor:
        """``relu(conv2d(x, w) + bias (+ residual))``, the addition in oneDNN's call where PyTorch has it."""
        if tiles.takes(x.dtype):
            problem = tiles.sizes(x.shape, w.shape, stride, pad, dilation)
            return tiles.folded_conv(x, tiles.packed(w, problem), problem, bias.float(), residual, relu)
        if residual is None or not onednn.takes(x.dtype):
            return super().conv_bias_act(x, w, bias, stride, pad, residual, relu, dilation)
        x, padding = padded(x, pad)
        geometry = stride, padding, dilation
        return nhwc(onednn.conv_bias_act(nchw(x), nchw(w), bias.to(x.dtype), *geometry, nchw(residual), relu))

    def bn_add_relu_conv(
        self,
        y: Tensor,
        coef: Tensor,
        shortcut: Tensor | None,
        shortcut_coef: Tensor | None,
        w: Tensor,
        moments: bool = True,
    ) -> tuple[Tensor, Tensor, Moments | None]:
        """``out = relu(bn(y) + shortcut)``, and of out the convolution with w [Cout, 1, 1, Cin] with its statistics."""
        out, pad = torch.empty_like(y), (0, 0, 0, 0)
        if tiles.takes(y.dtype):
            return out, *tiles.conv(y, w, 1, pad, 1, coef, None, moments, shortcut, shortcut_coef, out)
        output = _Output(out, w, 1, pad, moments)
        for images in output.parts:
            a = passes.store_bn_add_relu(y[images], coef, _at(shortcut, images), shortcut_coef, True, out[images])
            output.take(images, products.forward(a, w, 1, pad, output.at(images)))
        return out, *output.result()

    def conv_backward(
        self,
        dz: Tensor,
        y: Tensor | None,
        abc: Tensor | None,
        x: Tensor,
        coef: Tensor | None,
        w: Tensor,
        stride: int,
        pad: Pad,
        residual: Tensor | None = None,
        need_dx: bool = True,
        need_dw: bool = True,
        end: tuple[Tensor, Tensor] | None = None,
        residual_stride: int = 1,
        spare: bool = False,
        dilation: int = 1,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dx, sums, dw), see `fastres.ops.library.LibraryConvolutions.conv_backward`."""
        if not need_dx and not need_dw:
            return None, None, None
        if not tiles.takes(dz.dtype):
            return self._parted_backward(
                dz,
                y,
                abc,
                x,
                coef,
                w,
                stride,
                pad,
                residual,
                need_dx,
                need_dw,
                end,
                residual_stride,
                spare,
                dilation,
            )
        problem, dx, sums, dw = tiles.sizes(x.shape, w.shape, stride, pad, dilation), None, None, None
        if need_dw and tiles.takes_weight_grad(w):
            dw = tiles.weight_grad(x, coef, dz, y, abc, problem)
        elif need_dw:
            given = dz, y, abc, x, coef, w, stride, pad
            dw = self._parted_backward(*given, need_dx=False, need_dw=True, dilation=dilation)[2]
        if need_dx:  # last, as it may be written over the gradient that came in
            below = end if coef is None else (x, coef)
            dx, sums = _data_grad(dz, y, abc, w, problem, x, coef, below, residual, residual_stride, spare)
        return dx, sums, dw

    def _parted_backward(
        self,
        dz: Tensor,
        y: Tensor | None,
        abc: Tensor | None,
        x: Tensor,
        coef: Tensor | None,
        w: Tensor,
        stride: int,
        pad: Pad,
        residual: Tensor | None = None,
        need_dx: bool = True,
        need_dw: bool = True,
        end: tuple[Tensor, Tensor] | None = None,
        residual_stride: int = 1,
        spare: bool = False,
        dilation: int = 1,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """`conv_backward` around PyTorch's convolution."""
        below, sums, dw = end if coef is None else (x, coef), [], None
        parts = _parts(x, dz, w)
        in_residual = spare and residual is not None and residual.shape == x.shape and residual_stride == 1
        dx = None
        if need_dx and len(parts) > 1:
            dx = residual if in_residual else dz.new_empty(x.shape)
        for images in parts:
            dy = dx_part = dw_part = None  # those of the part before are free now
            dy = dz[images] if abc is None else passes.bn_backward_apply(dz[images], _at(y, images), abc)
            to = _at(dx, images)
            room = None if in_residual else to
            dx_part, dw_part = products.backward(dy, x[images], coef, w, stride, pad, room, need_dx, need_dw, dilation)
            if need_dw:
                dw = dw_part if dw is None else dw.add_(dw_part)
            if not need_dx:
                continue
            if dx is None:
                dx = to = dx_part
            added = _at(residual, images)
            if added is not None and (residual_stride > 1 or added.shape[3] != dx_part.shape[3]):
                add_residual(dx_part, added, residual_stride)
                added = None
            if below is not None:
                sums.append(passes.new_sums(dx_part))
                of = below[0][images], below[1]
                passes.store_relu_backward(dx_part, added, x[images], coef, of, to, sums[-1])
            elif added is not None:
                torch.add(dx_part, added, out=to)
            elif dx_part is not to:
                to.copy_(dx_part)
        return dx, _joined(sums), dw


def _data_grad(
    dz: Tensor,
    y: Tensor | None,
    abc: Tensor | None,
    w: Tensor,
    problem: tiles.Sizes,
    x: Tensor,
    coef: Tensor | None,
    below: tuple[Tensor, Tensor] | None,
    residual: Tensor | None,
    residual_stride: int,
    spare: bool,
) -> tuple[Tensor, Tensor | None]:
    """dx and the sums of `PartedConvolutions.conv_backward` by our own tiles."""
    mask, mask_coef = (None, None) if below is None else (x, coef)
    if residual is not None and (residual_stride > 1 or residual.shape != x.shape):
        dx, _ = tiles.data_grad(dz, y, abc, w, problem)
        add_residual(dx, residual, residual_stride)
        if below is None:
            return dx, None
        sums = passes.new_sums(dx)
        passes.store_relu_backward(dx, None, x, coef, below, dx, sums)
        return dx, sums
    in_residual = spare and residual is not None
    apart = not in_residual or _overlap(residual, dz)  # dz is read until the end
    out = None if apart else residual
    dx, sums = tiles.data_grad(dz, y, abc, w, problem, residual, mask, mask_coef, below, out)
    return residual.copy_(dx) if in_residual and apart else dx, sums


def _overlap(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


class _Output:
    """A convolution's output, put together part by part, and its statistics."""

    def __init__(self, x: Tensor, w: Tensor, stride: int, pad: Pad, moments: bool, dilation: int = 1):
        shape = x.shape[0], *output_hw(x.shape[1:3], w.shape[1:3], stride, pad, dilation), w.shape[0]
        self.parts = _parts(x, x.new_empty(1).expand(shape), w)
        self._y = x.new_empty(shape) if len(self.parts) > 1 else None
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
        if self._moments is None or len(self._moments) == 1:
            return self._y, self._moments and self._moments[0]
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
