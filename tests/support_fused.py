"""What the tests of the fused rooms share: eager twins of the operations, and errors against fp64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.ops import Conv, Layer, Norm

# relative error that rounding alone explains, whatever eager's happens to be
FLOOR = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def random_norm(channels: int, gamma: bool = True, frozen: bool = False, shift: float = 0.1) -> Norm:
    """fp64 BatchNorm with random parameters, and running statistics if frozen."""
    options = {"dtype": torch.float64}
    running = (torch.randn(channels, **options) * 0.1, torch.rand(channels, **options) + 0.5) if frozen else ()
    return Norm(
        torch.rand(channels, **options) + 0.5 if gamma else None, torch.randn(channels, **options) * shift, *running
    )


def random_weight(inputs: int, outputs: int, kernel: int) -> Tensor:
    """fp64 weight [outputs, inputs, kernel, kernel] of variance 2 / fan-in."""
    scale = (2 / (inputs * kernel * kernel)) ** 0.5
    return torch.randn(outputs, inputs, kernel, kernel, dtype=torch.float64) * scale


def random_layer(inputs: int, outputs: int, kernel: int, stride: int = 1, pad=None, **norm: bool) -> Layer:
    """fp64 convolution with the BatchNorm on its output."""
    pad = (kernel // 2,) * 4 if pad is None else pad
    return Layer(random_weight(inputs, outputs, kernel), random_norm(outputs, **norm), stride, pad)


def eager_conv(x: Tensor, conv: Conv | Layer) -> Tensor:
    """The convolution of x [N, C, H, W]."""
    top, left, bottom, right = conv.pad
    return F.conv2d(F.pad(x, (left, right, top, bottom)), conv.weight, stride=conv.stride)


def eager_norm(x: Tensor, norm: Norm) -> Tensor:
    """The BatchNorm of x [N, C, H, W]."""
    training = norm.running_mean is None
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.gamma, norm.beta, training, 0.0, norm.eps)


def eager_residual(x: Tensor, layers: Sequence[Layer], shortcut, relu: bool = True) -> Tensor:
    """`fastres.ops.residual_block` in plain PyTorch, NHWC in and out."""
    x = y = x.permute(0, 3, 1, 2)
    for layer in layers[:-1]:
        y = F.relu(eager_norm(eager_conv(y, layer), layer.norm))
    y = eager_norm(eager_conv(y, layers[-1]), layers[-1].norm)
    if isinstance(shortcut, Layer):
        y = y + eager_norm(eager_conv(x, shortcut), shortcut.norm)
    elif shortcut is not None:
        y = y + shortcut.permute(0, 3, 1, 2)
    return (F.relu(y) if relu else y).permute(0, 2, 3, 1)


def eager_preact(x: Tensor, layers: Sequence[Layer], shortcut) -> Tensor:
    """`fastres.ops.preact_block` in plain PyTorch, NHWC in and out."""
    nchw = x.permute(0, 3, 1, 2)
    first = y = F.relu(eager_norm(nchw, layers[0].norm))
    for layer, after in zip(layers, layers[1:]):
        y = F.relu(eager_norm(eager_conv(y, layer), after.norm))
    y = eager_conv(y, layers[-1])
    if isinstance(shortcut, Conv):
        y = y + eager_conv(first, shortcut)
    elif shortcut is not None:
        y = y + nchw
    return y.permute(0, 2, 3, 1)


def cast(value, dtype: torch.dtype):
    """A leaf copy: activations and weights in ``dtype``, BatchNorm's vectors in fp32 at least; all need gradients."""
    if isinstance(value, Tensor):
        target = dtype if value.dim() > 1 else torch.promote_types(dtype, torch.float32)
        return value.detach().to(target).requires_grad_()
    if isinstance(value, Norm):
        wide = [None if t is None else cast(t, dtype) for t in value[:2]]
        running = [None if t is None else cast(t, dtype).detach() for t in value[2:4]]
        return Norm(*wide, *running, value.eps)
    if isinstance(value, (Layer, Conv)):
        return type(value)(*(cast(part, dtype) for part in value))
    if isinstance(value, list):
        return [cast(part, dtype) for part in value]
    return value


def leaves(*values) -> list[Tensor]:
    """All tensors that need gradients, in order."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found += [value] if value.requires_grad else []
        elif isinstance(value, (list, tuple)):
            found += leaves(*value)
    return found


def with_grads(function: Callable[..., Tensor], arguments: tuple, dtype: torch.dtype, dout: Tensor) -> list[Tensor]:
    """The result and the gradients of all its leaves, fp64, of ``function`` computed in ``dtype``."""
    arguments = tuple(cast(argument, dtype) for argument in arguments)
    out = function(*arguments)
    grads = torch.autograd.grad(out, leaves(*arguments), dout.to(dtype))
    return [t.detach().double() for t in (out, *grads)]


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Root-mean-square error in units of the exact root-mean-square."""
    return ((actual.double() - exact).norm() / exact.norm().clamp_min(1e-300)).item()


def assert_as_good_as_eager(
    fused: Callable[..., Tensor], eager: Callable[..., Tensor], arguments: tuple, dtype: torch.dtype
) -> None:
    """Result and gradients of ``fused`` in ``dtype`` err at most twice as much as eager's, both against fp64.

    Both are given the same values: the arguments rounded to ``dtype``.
    """
    arguments = tuple(cast(cast(argument, dtype), torch.float64) for argument in arguments)
    with torch.no_grad():
        out = eager(*arguments)
    dout = torch.randn_like(out).to(dtype).double()
    exact = with_grads(eager, arguments, torch.float64, dout)
    ours = with_grads(fused, arguments, dtype, dout)
    theirs = with_grads(eager, arguments, dtype, dout)
    assert len(ours) == len(exact)
    for index, (a, b, e) in enumerate(zip(ours, theirs, exact)):
        assert a.shape == e.shape
        error, bound = relative_error(a, e), max(2 * relative_error(b, e), FLOOR[dtype])
        assert error <= bound, f"tensor {index} of shape {tuple(e.shape)}: error {error:.2e} over {bound:.2e}"
