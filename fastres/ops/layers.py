"""What the fused operations are told about a convolution and its BatchNorm, and their checks of it.

Errors are worded as PyTorch words them for the same mistake in ``F.conv2d`` and ``F.batch_norm``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastres.kernels.geometry import Pad, output_hw

Shape = tuple[int, int, int, int]  # N, H, W, C


class Norm(NamedTuple):
    """A BatchNorm over C channels; with running statistics it is frozen, without it normalises by the batch."""

    gamma: Tensor | None  # [C], None: 1
    beta: Tensor | None  # [C], None: 0
    running_mean: Tensor | None = None  # [C]
    running_var: Tensor | None = None  # [C], unbiased
    eps: float = 1e-5


class Conv(NamedTuple):
    """A convolution without bias."""

    weight: Tensor  # [Cout, Cin, KH, KW] in any memory format; channels_last is read in place
    stride: int = 1
    pad: Pad = (0, 0, 0, 0)


class Layer(NamedTuple):
    """A convolution without bias and a BatchNorm: on its output, or in pre-activation blocks on its input."""

    weight: Tensor  # as in `Conv`
    norm: Norm
    stride: int = 1
    pad: Pad = (0, 0, 0, 0)


class Statistics(NamedTuple):
    """What a BatchNorm normalised by: coefficients [5, C] (mean, biased variance, ...) over ``count`` pixels."""

    coef: Tensor
    count: int


def symmetric(pad: int) -> Pad:
    """The same padding on all four sides."""
    return (pad, pad, pad, pad)


def in_autocast(x: Tensor) -> Tensor:
    """x in autocast's dtype where autocast is on for its device; fp64 and what already is stay as they are."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


def check_input(x: Tensor, weights: Sequence[Tensor]) -> None:
    """Raises RuntimeError where x is not a 4-D floating-point tensor of the weights' device and dtype."""
    check_activations(x)
    for weight in weights:
        if x.device != weight.device:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{x.device} (input) and {weight.device} (weight)!"
            )
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise RuntimeError(f"Input type ({x.dtype}) and weight type ({weight.dtype}) should be the same")


def check_activations(x: Tensor) -> None:
    """Raises RuntimeError for a tensor that is not a 4-D floating-point one with channels."""
    if x.dim() != 4:
        raise RuntimeError(f"expected 4D input (got {x.dim()}D input)")
    if not x.is_floating_point():
        raise RuntimeError(f"Input type ({x.dtype}) should be floating point")
    if x.shape[3] == 0:
        raise RuntimeError("expected input to have at least 1 channel, but got 0 channels instead")


def conv_shape(shape: Shape, conv: Conv | Layer) -> Shape:
    """Shape of the convolution of an input of ``shape``.

    Raises:
        RuntimeError: for another number of channels, or a kernel that is larger than the padded input.
    """
    n, height, width, channels = shape
    weight, pad = conv.weight, conv.pad
    if channels != weight.shape[1]:
        raise RuntimeError(
            f"Given groups=1, weight of size {list(weight.shape)}, expected input{nchw_size(shape)} "
            f"to have {weight.shape[1]} channels, but got {channels} channels instead"
        )
    padded, kernel = (height + pad[0] + pad[2], width + pad[1] + pad[3]), tuple(weight.shape[2:])
    if padded[0] < kernel[0] or padded[1] < kernel[1]:
        raise RuntimeError(
            f"Calculated padded input size per channel: ({padded[0]} x {padded[1]}). Kernel size: "
            f"({kernel[0]} x {kernel[1]}). Kernel size can't be greater than actual input size"
        )
    return (n, *output_hw((height, width), kernel, conv.stride, pad), weight.shape[0])


def layer_shape(shape: Shape, layer: Layer) -> Shape:
    """Shape of the layer's output for an input of ``shape``.

    Raises:
        RuntimeError: see `conv_shape` and `check_norm`.
        ValueError: see `check_norm`.
    """
    shape = conv_shape(shape, layer)
    check_norm(layer.norm, shape)
    return shape


def check_norm(norm: Norm, shape: Shape) -> None:
    """Check a BatchNorm against the shape of what it normalises.

    Raises:
        RuntimeError: where a parameter or a running statistic has not as many elements as there are channels.
        ValueError: where batch statistics would have fewer than two values a channel.
    """
    names = {"weight": norm.gamma, "bias": norm.beta, "running_mean": norm.running_mean}
    for name, tensor in {**names, "running_var": norm.running_var}.items():
        if tensor is not None and tensor.numel() != shape[3]:
            raise RuntimeError(f"{name} should contain {shape[3]} elements not {tensor.numel()}")
    if norm.running_mean is None and pixels(shape) < 2:
        raise ValueError(
            "Expected more than 1 value per channel when training, got input size "
            f"{torch.Size(nchw_size(shape))}"
        )


def pixels(shape: Shape) -> int:
    """N*H*W: values a channel."""
    return shape[0] * shape[1] * shape[2]


def nchw_size(shape: Shape) -> list[int]:
    """The shape as PyTorch's users know it."""
    return [shape[0], shape[3], shape[1], shape[2]]


def nhwc_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[Cout, Cin, KH, KW] as [Cout, KH, KW, Cin] in the activations' dtype; a view where it can be."""
    return weight.to(dtype).permute(0, 2, 3, 1).contiguous()


def weight_grad(dw: Tensor, dtype: torch.dtype) -> Tensor:
    """[Cout, KH, KW, Cin] as the channels-last gradient of a weight [Cout, Cin, KH, KW]."""
    return dw.permute(0, 3, 1, 2).to(dtype)
