"""Inference convolution: BatchNorm is folded into weight and bias, the shortcut and the ReLU join the epilogue."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fastres.kernels.geometry import Pad
from fastres.ops import cpu, plain
from fastres.ops.backends.fake import Fake
from fastres.ops.backends.protocol import Backend, Convolution
from fastres.ops.backends.vendor import nchw, nhwc
from fastres.ops.layers import (
    Conv,
    check_device,
    check_input,
    check_shortcut,
    conv_shape,
    in_autocast,
    nhwc_weight,
)
from fastres.ops.nodes import Conv as ConvNode
from fastres.ops.operation import isolated, operation, without_autocast
from fastres.ops.select import backend_for, is_cpp


def conv_bias_act(
    x: Tensor,
    conv: Conv,
    bias: Tensor,
    residual: Tensor | None = None,
    relu: bool = True,
    packed: cpu.PackedConv | None = None,
) -> Tensor:
    """``relu(conv(x) + bias (+ residual))``; where a gradient may be wanted, in PyTorch's own functions.

    Args:
        x: [N, H, W, C].
        bias: [C'], of any floating-point dtype.
        residual: [N, H', W', C'].
        packed: where a CPU keeps what calls have in common; the caller's, one a convolution.

    Raises:
        RuntimeError: as `torch.nn.functional.conv2d` raises it.
    """
    check_input(x, [conv.weight])
    shape = conv_shape(tuple(x.shape), conv)
    if bias.shape != shape[3:]:
        raise RuntimeError(
            f"Given weight of size {list(conv.weight.shape)}, expected bias to be 1-dimensional with {shape[3]} "
            f"elements, but got bias of size {list(bias.shape)} instead"
        )
    check_device(bias, "bias", x.device)
    if residual is not None:
        check_shortcut(residual, shape, x)
    x = in_autocast(x).contiguous()
    residual = None if residual is None else in_autocast(residual).contiguous()
    if is_recorded(x, conv.weight, bias, residual) or plain.is_needed(x, residual):
        return _plain(x, conv, bias, residual, relu)
    if packed is not None and _is_run(x) and not (conv.weight.is_inference() or bias.is_inference()):
        if is_cpp(x) and cpu.packs(x.dtype):
            window = conv.stride, conv.pad, conv.dilation
            return cpu.packed_conv_bias_act(x, conv.weight, packed, bias, window, residual, relu)
    weight = nhwc_weight(conv.weight, x.dtype)
    geometry = [conv.stride, *conv.pad, conv.dilation]
    return conv_bias_act_forward(x, weight, bias.contiguous(), geometry, residual, relu)


@without_autocast
def _plain(x: Tensor, conv: Conv, bias: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    node = ConvNode(conv.stride, conv.pad, conv.dilation)
    y = node.plain(plain.Plain([conv.weight]), nchw(x)) + bias.to(x.dtype)[:, None, None]
    if residual is not None:
        y = y + nchw(residual)
    return nhwc(torch.relu(y) if relu else y)


def repeat_conv_bias_act(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool, packed: cpu.PackedConv
) -> Tensor | None:
    """`conv_bias_act` of what is like the last call with ``packed``, without looking at it twice.

    Args:
        x, residual: [N, C, H, W] and like the result.
        weight: [C', C, KH, KW].

    Returns:
        [N, C', H', W'] in channels-last memory; None where `conv_bias_act` is to be called.
    """
    if not (_is_compiled(x, weight, bias, residual) and packed.is_ready) or torch.is_autocast_enabled("cpu"):
        return None
    return packed.repeat(x, weight, bias, residual, relu)


def repeat_block(x: Tensor, block: cpu.FoldedLayers, packed: cpu.PackedBlock) -> Tensor | None:
    """A folded block whose convolutions were called with x like this before, at once.

    Args:
        x: [N, C, H, W].

    Returns:
        [N, C', H', W'] in channels-last memory; None where the convolutions are to be called.
    """
    if not _is_compiled(x, *(layer.weight for layer in block.convs)) or torch.is_autocast_enabled("cpu"):
        return None
    return packed.repeat(x, block)


def repeat_max_pool(x: Tensor, kernel: int, stride: int, pad: Pad) -> Tensor | None:
    """Max-pool of x [N, C, H, W] in channels-last memory by the compiled pass; None where the pool is to be called."""
    nhwc_x = nhwc(x)
    if not _is_compiled(x) or not nhwc_x.is_contiguous() or not x.numel():
        return None
    return nchw(cpu.passes.max_pool(nhwc_x, kernel, stride, pad))


def is_recorded(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is done with these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _is_compiled(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the CPU's compiled passes compute what is made of these: values that nothing differentiates."""
    return _is_run(x) and is_cpp(x) and not plain.is_transformed() and not is_recorded(x, *others)


def _is_run(x: Tensor) -> bool:
    """Whether x has values and goes to the device: nothing traces, fakes or counts the operations."""
    return type(x) is Tensor and _get_current_dispatch_mode() is None and not torch.compiler.is_compiling()


@operation("conv_bias_act")
def conv_bias_act_forward(
    x: Tensor, w: Tensor, bias: Tensor, geometry: list[int], residual: Tensor | None, relu: bool
) -> Tensor:
    """See `conv_bias_act`.

    Args:
        w: [Cout, KH, KW, Cin].
        geometry: stride, the padding's four sides and dilation.
    """
    with isolated(x):
        return _forward(backend_for(x), x, w, bias, geometry, residual, relu)


@conv_bias_act_forward.register_fake
def _(x, w, bias, geometry, residual, relu):
    return _forward(Fake(), x, w, bias, geometry, residual, relu)


def _forward(
    p: Backend, x: Tensor, w: Tensor, bias: Tensor, geometry: list[int], residual: Tensor | None, relu: bool
) -> Tensor:
    stride, top, left, bottom, right, dilation = geometry
    return p.conv_bias_act(x, Convolution(w, stride, (top, left, bottom, right), dilation), bias, residual, relu)
