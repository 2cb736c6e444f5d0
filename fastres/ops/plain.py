"""Every operation in PyTorch's own functions, which can be differentiated any number of times, batched and dualised.

What the fused operations have no form of their own for is computed by these, see `is_needed`; so are gradients that are
to be differentiated again, see `fastres.ops.again`. Arguments and results are those of the operations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastres.ops.aten import coefficients_of, statistics_dtype
from fastres.ops.layers import Conv, Identity, Layer, Norm, Pad, Statistics
from fastres.ops.library import nchw
from fastres.ops.operation import without_autocast


def is_needed(*tensors: Tensor | None) -> bool:
    """Whether an operation on these is computed here.

    So are empty batches, what `torch.func` transforms, forward-mode differentiation and subclasses that wrap tensors
    (such as DTensor), as PyTorch's own functions know what to do with them.
    """
    x = tensors[0]
    if x is not None and not x.numel():
        return True
    return is_transformed() or any(is_traceable_wrapper_subclass(t) for t in tensors if t is not None)


def is_transformed() -> bool:
    """Whether a transform of `torch.func` or a level of forward-mode differentiation is active."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def check_alone(group: str | None) -> None:
    """Raises RuntimeError for a process group: no gradient of a gradient crosses ranks."""
    if group is not None:
        raise RuntimeError(
            "fused operations with BatchNorm synchronised over a process group have first derivatives only, and no "
            "torch.func transforms: run the network's eager form, fastres.nn.unfuse(model)"
        )


@without_autocast
def residual_chain(
    x: Tensor,
    blocks: Sequence[Sequence[Layer]],
    shortcut: Tensor | Layer | Identity | None = None,
    relu: bool = True,
    identities: Sequence[Identity] = (),
    result: Tensor | None = None,
) -> tuple[Tensor, list[Statistics]]:
    """See `fastres.ops.residual_chain`.

    Args:
        result: of the first block, where the values of its shortcut, a tensor, are not known; derivatives are as if
            they were.
    """
    found: list[Statistics] = []
    projected: list[Statistics] = []
    y = nchw(x)
    for index, layers in enumerate(blocks):
        before = y
        for layer in layers[:-1]:
            y = F.relu(_norm(_conv(y, layer), layer.norm, found))
        y = _norm(_conv(y, layers[-1]), layers[-1].norm, found)
        added = shortcut if index == 0 else identities[index - 1]
        if isinstance(added, Layer):
            y = y + _norm(_conv(before, added), added.norm, projected)
        elif isinstance(added, Identity):
            y = y + F.pad(before[:, :, :: added.stride, :: added.stride], (0, 0, 0, 0, 0, added.added))
        elif added is not None:
            y = y + nchw(added)
        if index == 0 and result is not None:
            y = torch.where(nchw(result) > 0, y + (nchw(result) - y).detach(), 0)
        elif relu or index < len(blocks) - 1:
            y = F.relu(y)
    return _nhwc(y), found + projected


@without_autocast
def preact_block(
    x: Tensor, layers: Sequence[Layer], shortcut: Tensor | Conv | None = None, next_coef: bool = False
) -> tuple[Tensor, Tensor | None, list[Statistics]]:
    """See `fastres.ops.preact_block`."""
    found: list[Statistics] = []
    y = nchw(x)
    first = a = F.relu(_norm(y, layers[0].norm, found))
    for layer, after in zip(layers, layers[1:]):
        a = F.relu(_norm(_conv(a, layer), after.norm, found))
    out = _conv(a, layers[-1])
    if isinstance(shortcut, Conv):
        out = out + _conv(first, shortcut)
    elif shortcut is not None:
        out = out + y
    return _nhwc(out), _statistics(out, Norm(None, None, eps=0.0)).coef if next_coef else None, found


@without_autocast
def stem(x: Tensor, layer: Layer, kernel: int, stride: int, pad: Pad) -> tuple[Tensor, Statistics]:
    """See `fastres.ops.stem`."""
    found: list[Statistics] = []
    a = F.relu(_norm(_conv(nchw(x), layer), layer.norm, found))
    top, left, bottom, right = pad
    if (top, left) == (bottom, right) == (top, top):
        return _nhwc(F.max_pool2d(a, kernel, stride, top)), found[0]
    a = F.pad(a, (left, right, top, bottom), value=-float("inf"))
    return _nhwc(F.max_pool2d(a, kernel, stride)), found[0]


@without_autocast
def bn_relu(x: Tensor, norm: Norm) -> tuple[Tensor, Statistics]:
    """See `fastres.ops.bn_relu`."""
    found: list[Statistics] = []
    return _nhwc(F.relu(_norm(nchw(x), norm, found))), found[0]


@without_autocast
def global_avg_pool(x: Tensor) -> Tensor:
    """See `fastres.ops.global_avg_pool`."""
    return F.adaptive_avg_pool2d(nchw(x), 1)[:, :, 0, 0]


@without_autocast
def conv_bias_act(x: Tensor, conv: Conv, bias: Tensor, residual: Tensor | None = None, relu: bool = True) -> Tensor:
    """See `fastres.ops.conv_bias_act`."""
    y = _conv(nchw(x), conv, bias)
    if residual is not None:
        y = y + nchw(residual)
    return _nhwc(F.relu(y) if relu else y)


def _conv(x: Tensor, conv: Conv | Layer, bias: Tensor | None = None) -> Tensor:
    top, left, bottom, right = conv.pad
    weight, bias = conv.weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if (top, left) == (bottom, right):
        return F.conv2d(x, weight, bias, conv.stride, (top, left), conv.dilation)
    return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, conv.stride, 0, conv.dilation)


def _norm(y: Tensor, norm: Norm, found: list[Statistics]) -> Tensor:
    check_alone(norm.group if norm.running_mean is None else None)
    found.append(_statistics(y, norm))
    dtype = statistics_dtype(y.dtype)
    gamma, beta, mean, var = (None if t is None else t.to(dtype) for t in norm[:4])
    # not functional.batch_norm, whose checks `check_norm` has done: PyTorch 2.11's refuse an eps of 0 everywhere
    return torch.batch_norm(y, gamma, beta, mean, var, mean is None, 0.0, norm.eps, torch.backends.cudnn.enabled)


def _statistics(y: Tensor, norm: Norm) -> Statistics:
    """What y is normalised by; not differentiable."""
    y, dtype = y.detach(), statistics_dtype(y.dtype)
    gamma, beta, mean, var = (None if t is None else t.detach() for t in norm[:4])
    if mean is None or var is None:
        if y.numel():
            var, mean = torch.var_mean(y.to(dtype), (0, 2, 3), correction=0)
        else:  # nothing has no mean
            mean = var = y.new_zeros(y.shape[1], dtype=dtype)
    return Statistics(
        coefficients_of(mean.double(), var.double(), gamma, beta, norm.eps, dtype), y.numel() // max(1, y.shape[1])
    )


def _nhwc(y: Tensor) -> Tensor:
    return y.permute(0, 2, 3, 1).contiguous()
