"""What the fused operations are told about a convolution and its BatchNorm, and their checks of it.

Errors are worded as PyTorch words them for the same mistake in ``F.conv2d`` and ``F.batch_norm``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres.kernels.geometry import Pad, cdiv, extent, output_hw
from fastres.kernels.types import ACTIVATIONS
from fastres.ops.operation import has_autocast

Shape = tuple[int, ...]  # N, H, W, C


class Norm(NamedTuple):
    """A BatchNorm over C channels; with running statistics it is frozen, without it normalises by the batch.

    With ``group``, the name of a process group, the batch is that of all its ranks together. ``act`` is the activation
    behind it, one of `fastres.kernels.types.ACTIVATIONS`; behind the shortcut that is added to it, where there is one.
    """

    gamma: Tensor | None  # [C], None: 1
    beta: Tensor | None  # [C], None: 0
    running_mean: Tensor | None = None  # [C]
    running_var: Tensor | None = None  # [C], unbiased
    eps: float = 1e-5
    group: str | None = None
    act: str = "relu"


class Conv(NamedTuple):
    """A convolution without bias."""

    weight: Tensor  # [Cout, Cin, KH, KW] in any memory format; channels_last is read in place
    stride: int = 1
    pad: Pad = (0, 0, 0, 0)
    dilation: int = 1


class Layer(NamedTuple):
    """A convolution without bias and a BatchNorm: on its output, or in pre-activation blocks on its input."""

    weight: Tensor  # as in `Conv`
    norm: Norm
    stride: int = 1
    pad: Pad = (0, 0, 0, 0)
    dilation: int = 1


class Identity(NamedTuple):
    """A shortcut without parameters: every ``stride``-th pixel, and ``added`` channels of zeros behind its own."""

    stride: int = 1
    added: int = 0


class Statistics(NamedTuple):
    """What a BatchNorm normalised by: coefficients [5, C] (mean, biased variance, ...) over ``count`` pixels.

    A synchronised one has them over all ranks' pixels, whose number is a sixth row; ``count`` is then this rank's.
    """

    coef: Tensor
    count: int  # type: ignore[assignment]  # a tuple's own `count` is not wanted


def symmetric(pad: int) -> Pad:
    """The same padding on all four sides."""
    return (pad, pad, pad, pad)


def in_autocast(x: Tensor) -> Tensor:
    """x in autocast's dtype where autocast is on for its device; fp64 and what already is stay as they are."""
    device = x.device.type
    if has_autocast(device) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


def check_input(x: Tensor, weights: Sequence[Tensor]) -> None:
    """Raises RuntimeError where x is not a 4-D floating-point tensor of the weights' device and dtype."""
    check_activations(x)
    for weight in weights:
        if weight.dim() != 4:
            raise RuntimeError(f"expected 4D weight (got {weight.dim()}D weight)")
        check_strided(weight, "weight")
        check_like(weight, "weight", x)


def check_activations(x: Tensor) -> None:
    """Raises RuntimeError for a tensor that is not a 4-D floating-point one with channels."""
    if x.dim() != 4:
        raise RuntimeError(f"expected 4D input (got {x.dim()}D input)")
    if not x.is_floating_point():
        raise RuntimeError(f"Input type ({x.dtype}) should be floating point")
    check_strided(x, "input")
    if x.shape[3] == 0:
        raise RuntimeError("expected input to have at least 1 channel, but got 0 channels instead")


def check_strided(tensor: Tensor, name: str) -> None:
    """Raises RuntimeError for a sparse tensor and the like."""
    if tensor.layout != torch.strided:
        raise RuntimeError(f"expected {name} to be a dense tensor (layout torch.strided), but got {tensor.layout}")


def check_like(tensor: Tensor, name: str, x: Tensor) -> None:
    """Raises RuntimeError for another device than x's, or outside autocast another dtype."""
    check_device(tensor, name, x.device)
    if x.dtype != tensor.dtype and not has_autocast(x.device.type):
        raise RuntimeError(f"Input type ({x.dtype}) and {name} type ({tensor.dtype}) should be the same")


def check_device(tensor: Tensor, name: str, device: torch.device) -> None:
    """Raises RuntimeError for another device than the input's."""
    if tensor.device != device:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{device} (input) and {tensor.device} ({name})!"
        )


def check_shortcut(shortcut: Tensor, shape: Shape, x: Tensor) -> None:
    """Raises RuntimeError where it cannot be added to a result of that shape which is made of x."""
    check_activations(shortcut)
    check_like(shortcut, "shortcut", x)
    check_shortcut_shape(tuple(shortcut.shape), shape)


def check_shortcut_shape(added: Shape, shape: Shape) -> None:
    """Raises RuntimeError where the shapes differ: nothing is broadcast."""
    if added != shape:
        raise RuntimeError(
            f"The size of the shortcut {nchw_size(added)} must match the size of the block's result {nchw_size(shape)}"
        )


def identity_shape(shape: Shape, identity: Identity) -> Shape:
    """Shape of the shortcut from an input of ``shape``; raises RuntimeError for what means nothing."""
    n, height, width, channels = shape
    if identity.stride < 1:
        raise RuntimeError("non-positive stride is not supported")
    if identity.added < 0:
        raise RuntimeError("negative padding is not supported")
    return n, cdiv(height, identity.stride), cdiv(width, identity.stride), channels + identity.added


def conv_shape(shape: Shape, conv: Conv | Layer) -> Shape:
    """Shape of the convolution of an input of ``shape``.

    Raises:
        RuntimeError: for another number of channels, a kernel that is larger than the padded input, or a stride,
            padding or dilation that means nothing.
    """
    n, height, width, channels = shape
    weight, pad = conv.weight, conv.pad
    if conv.stride < 1:
        raise RuntimeError("non-positive stride is not supported")
    if min(pad) < 0:
        raise RuntimeError("negative padding is not supported")
    if conv.dilation < 1:
        raise RuntimeError("non-positive dilation is not supported")
    if channels != weight.shape[1]:
        raise RuntimeError(
            f"Given groups=1, weight of size {list(weight.shape)}, expected input{nchw_size(shape)} "
            f"to have {weight.shape[1]} channels, but got {channels} channels instead"
        )
    if 0 in weight.shape:
        raise RuntimeError(
            f"Given groups=1, expected weight to be at least 1 at dimension {weight.shape.index(0)}, but got weight of "
            f"size {list(weight.shape)} instead"
        )
    padded, kernel = (height + pad[0] + pad[2], width + pad[1] + pad[3]), tuple(weight.shape[2:])
    reach = tuple(extent(size, conv.dilation) for size in kernel)
    if padded[0] < reach[0] or padded[1] < reach[1]:
        raise RuntimeError(
            f"Calculated padded input size per channel: ({padded[0]} x {padded[1]}). Kernel size: "
            f"({reach[0]} x {reach[1]}). Kernel size can't be greater than actual input size"
        )
    return (n, *output_hw((height, width), kernel, conv.stride, pad, conv.dilation), weight.shape[0])


def layer_shape(shape: Shape, layer: Layer) -> Shape:
    """Shape of the layer's output for an input of ``shape``.

    Raises:
        RuntimeError: see `conv_shape` and `check_norm`.
        ValueError: see `check_norm`.
    """
    shape = conv_shape(shape, layer)
    check_norm(layer.norm, shape, layer.weight.device)
    return shape


def check_norm(norm: Norm, shape: Shape, device: torch.device) -> None:
    """Check a BatchNorm against the shape and the device of what it normalises.

    Raises:
        RuntimeError: where a parameter or a running statistic has not as many elements as there are channels, or is on
            another device, or one of the running statistics is missing.
        ValueError: where batch statistics would be of one value a channel, synchronised ones of none of this rank; for
            an eps that is not positive, with running statistics for a negative one; for an unknown activation.
    """
    if norm.act not in ACTIVATIONS:
        raise ValueError(f"{norm.act!r} is no activation: choose {', '.join(ACTIVATIONS)}")
    names = ("weight", "bias", "running_mean", "running_var")
    for name, tensor in zip(names, norm[:4]):
        if tensor is None:
            continue
        if tensor.numel() != shape[3]:
            raise RuntimeError(f"{name} should contain {shape[3]} elements not {tensor.numel()}")
        check_device(tensor, name, device)
    if (norm.running_mean is None) != (norm.running_var is None):
        missing = "running_mean" if norm.running_mean is None else "running_var"
        raise RuntimeError(f"{missing} must be defined in evaluation mode")
    if norm.eps < 0 or (norm.running_mean is None and norm.eps == 0):
        raise ValueError(
            f"batch_norm eps must be {'positive during training' if norm.running_mean is None else 'non-negative'}, "
            f"but got {norm.eps}"
        )
    if norm.running_mean is None and pixels(shape) == (1 if norm.group is None else 0):
        raise ValueError(
            f"Expected more than {0 if norm.group else 1} value per channel when training, got input size "
            f"{torch.Size(nchw_size(shape))}"
        )


def group_of(norms: Sequence[Norm]) -> str | None:
    """The process group of the batch statistics among the norms; raises ValueError where they have several."""
    groups = {norm.group for norm in norms if norm.running_mean is None}
    if len(groups) > 1:
        raise ValueError("the BatchNorms of one operation must all be synchronised over one process group, or none")
    return groups.pop() if groups else None


def check_coef(coef: Tensor, channels: int, device: torch.device) -> None:
    """Raises RuntimeError where coef is not [5, channels] on ``device``."""
    if coef.shape != (5, channels):
        raise RuntimeError(f"coef should be of size {[5, channels]}, but got size {list(coef.shape)} instead")
    check_device(coef, "coef", device)


def norm_vectors(norm: Norm) -> list[Tensor | None]:
    """gamma, beta, running mean and running variance as contiguous vectors, themselves where they are that."""
    return [None if t is None else contiguous_vector(t) for t in norm[:4]]


def contiguous_vector(tensor: Tensor) -> Tensor:
    """[C] without gaps, the tensor itself where it is that."""
    return tensor if tensor.dim() == 1 and tensor.is_contiguous() else tensor.reshape(-1).contiguous()


def contiguous(tensors: Sequence[Any]) -> list[Any]:
    """Saved tensors without gaps: hooks may hand back others than those that were saved."""
    return [None if t is None else t.contiguous() for t in tensors]


def dense(dout: Tensor) -> Tensor:
    """The gradient of a result, without gaps: autograd may hand on an expanded or a sparse one."""
    if torch.compiler.is_compiling() or dout.layout == torch.strided:  # compiled code knows dense tensors alone
        return dout.contiguous()
    return dout.to_dense().contiguous()


def pixels(shape: Shape) -> int:
    """N*H*W: values a channel."""
    return shape[0] * shape[1] * shape[2]


def nchw_size(shape: Shape) -> list[int]:
    """The shape as PyTorch's users know it."""
    return [shape[0], shape[3], shape[1], shape[2]]


def nhwc_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[Cout, Cin, KH, KW] as [Cout, KH, KW, Cin] in the activations' dtype; a view where it can be."""
    return weight.to(dtype).permute(0, 2, 3, 1).contiguous()


def nhwc_weights(weights: Sequence[Tensor], dtype: torch.dtype, rounded: bool = False) -> list[Tensor]:
    """`nhwc_weight` of each; those of another dtype are cast together, on a GPU by a single launch.

    Args:
        rounded: by who reads them: fp32 in channels-last memory stays as it is.
    """
    if torch.compiler.is_compiling():  # the compiler has launches of its own
        return [nhwc_weight(weight, dtype) for weight in weights]
    if rounded:
        views = [weight.permute(0, 2, 3, 1) for weight in weights]
        if all(view.is_contiguous() and view.dtype in (dtype, torch.float32) for view in views):
            return views
    cast = [weight for weight in weights if weight.dtype != dtype]
    made = [_empty_nhwc(weight, dtype) for weight in cast]
    if made:
        torch._foreach_copy_([one.permute(0, 3, 1, 2) for one in made], cast)
    left = iter(made)
    return [next(left) if weight.dtype != dtype else nhwc_weight(weight, dtype) for weight in weights]


def _empty_nhwc(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for `nhwc_weight`, with its very strides: libraries choose by those of dimensions of size 1 too."""
    nhwc = weight.permute(0, 2, 3, 1)
    if nhwc.is_contiguous():
        return torch.empty_like(weight, dtype=dtype).permute(0, 2, 3, 1)
    return torch.empty_like(nhwc, dtype=dtype, memory_format=torch.contiguous_format)


def weight_grad(dw: Tensor, dtype: torch.dtype) -> Tensor:
    """[Cout, KH, KW, Cin] as the channels-last gradient of a weight [Cout, Cin, KH, KW]."""
    return (dw if dw.dtype == dtype else dw.to(dtype)).permute(0, 3, 1, 2)
