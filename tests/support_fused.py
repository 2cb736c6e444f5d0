"""What the tests of fused operations and modules share: eager twins of the operations, and errors against fp64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.kernels.geometry import extent
from fastres.ops import Conv, Identity, Layer, Norm
from fastres.ops.layers import Pad

# relative error that rounding alone explains, whatever eager's happens to be
FLOOR = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# A gradient of fewer values is held to the bar over so many gradients of the result. One draw of 3 values says little:
# of a chain's bf16 gradients one in 12 was over by luck, compiled passes or Triton, dilated or not, though the median
# errors were eager's. Over 8 draws none of 420 was, and a fault of 2% showed in 94% of them; in one draw it showed in
# 80%.
FEW_VALUES, DRAWS = 32, 8


def random_norm(channels: int, gamma: bool = True, frozen: bool = False, shift: float = 0.1, act: str = "relu") -> Norm:
    """fp64 BatchNorm with random parameters, and running statistics if frozen."""
    options = {"dtype": torch.float64}
    running = (torch.randn(channels, **options) * 0.1, torch.rand(channels, **options) + 0.5) if frozen else ()
    return Norm(
        torch.rand(channels, **options) + 0.5 if gamma else None,
        torch.randn(channels, **options) * shift,
        *running,
        act=act,
    )


def random_weight(inputs: int, outputs: int, kernel: int) -> Tensor:
    """fp64 weight [outputs, inputs, kernel, kernel] of variance 2 / fan-in."""
    scale = (2 / (inputs * kernel * kernel)) ** 0.5
    return torch.randn(outputs, inputs, kernel, kernel, dtype=torch.float64) * scale


def random_layer(
    inputs: int, outputs: int, kernel: int, stride: int = 1, pad=None, dilation: int = 1, **norm: bool | str
) -> Layer:
    """fp64 convolution with the BatchNorm on its output."""
    pad = (extent(kernel, dilation) // 2,) * 4 if pad is None else pad
    return Layer(random_weight(inputs, outputs, kernel), random_norm(outputs, **norm), stride, pad, dilation)


def eager_conv(x: Tensor, conv: Conv | Layer) -> Tensor:
    """The convolution of x [N, C, H, W]."""
    top, left, bottom, right = conv.pad
    if (top, left) == (bottom, right):  # as nn.Conv2d: no zeros that an infinite gradient would make NaN of
        return F.conv2d(x, conv.weight, None, conv.stride, (top, left), conv.dilation)
    return F.conv2d(F.pad(x, (left, right, top, bottom)), conv.weight, None, conv.stride, 0, conv.dilation)


def eager_norm(x: Tensor, norm: Norm, tracked: list[Tensor] | None = None) -> Tensor:
    """The BatchNorm of x [N, C, H, W]; a ``tracked`` list receives the batch's mean and unbiased variance."""
    training = norm.running_mean is None
    running = norm.running_mean, norm.running_var
    if training and tracked is not None:
        running = new_statistics(x.shape[1], x)
        tracked += running
    return F.batch_norm(x, *running, norm.gamma, norm.beta, training, 1.0, norm.eps)


def new_statistics(channels: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Running mean and variance of a BatchNorm that has seen nothing, for activations like those given."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return tuple(torch.zeros(2, channels, dtype=dtype, device=like.device).unbind())


def relu(z: Tensor, norm: Norm) -> Tensor:
    """The activation of z, which ``norm`` shifts: how the eager twins rectify unless told otherwise."""
    return F.gelu(z) if norm.act == "gelu" else F.relu(z)


def relu_apart(z: Tensor, norm: Norm) -> Tensor:
    """ReLU of z [N, C, H, W] after a shift, of ``norm``'s beta in place too, that leaves no value near zero.

    Zero goes to the middle of each channel's widest gap between neighbouring values, the outer fifths left out. So no
    rounding changes a mask, which would be an error of the size of the gradient itself, in some results by luck.
    """
    values = z.transpose(0, 1).flatten(1).sort().values
    outer = values.shape[1] // 5
    values = values[:, outer : values.shape[1] - outer]
    low = values.diff().argmax(1, keepdim=True)
    shift = -(values.gather(1, low) + values.gather(1, low + 1))[:, 0] / 2
    norm.beta.add_(shift)
    return F.relu(z + shift[:, None, None])


def eager_residual(
    x: Tensor, layers: Sequence[Layer], shortcut, relu_last: bool = True, tracked=None, relu: Callable = relu
) -> Tensor:
    """`fastres.ops.residual_block` in plain PyTorch, NHWC in and out."""
    x = y = x.permute(0, 3, 1, 2)
    for layer in layers[:-1]:
        y = relu(eager_norm(eager_conv(y, layer), layer.norm, tracked), layer.norm)
    y = eager_norm(eager_conv(y, layers[-1]), layers[-1].norm, tracked)
    if isinstance(shortcut, Layer):
        y = y + eager_norm(eager_conv(x, shortcut), shortcut.norm, tracked)
    elif isinstance(shortcut, Identity):
        step = shortcut.stride
        y = y + F.pad(x[:, :, ::step, ::step], (0, 0, 0, 0, 0, shortcut.added))
    elif shortcut is not None:
        y = y + shortcut.permute(0, 3, 1, 2)
    return (relu(y, layers[-1].norm) if relu_last else y).permute(0, 2, 3, 1)


def eager_preact(x: Tensor, layers: Sequence[Layer], shortcut, tracked=None, relu: Callable = relu) -> Tensor:
    """`fastres.ops.preact_block` in plain PyTorch, NHWC in and out."""
    nchw = x.permute(0, 3, 1, 2)
    first = y = relu(eager_norm(nchw, layers[0].norm, tracked), layers[0].norm)
    for layer, after in zip(layers, layers[1:]):
        y = relu(eager_norm(eager_conv(y, layer), after.norm, tracked), after.norm)
    y = eager_conv(y, layers[-1])
    if isinstance(shortcut, Conv):
        y = y + eager_conv(first, shortcut)
    elif shortcut is not None:
        y = y + nchw
    return y.permute(0, 2, 3, 1)


def eager_stem(
    x: Tensor, layer: Layer, kernel: int, stride: int, pad: Pad, tracked=None, relu: Callable = relu
) -> Tensor:
    """`fastres.ops.stem` in plain PyTorch, NHWC in and out."""
    top, left, bottom, right = pad
    gelu = layer.norm.act == "gelu"  # not monotone: behind the pool
    a = eager_norm(eager_conv(x.permute(0, 3, 1, 2), layer), layer.norm, tracked)
    a = a if gelu else relu(a, layer.norm)
    a = F.pad(a, (left, right, top, bottom), value=-float("inf"))
    a = F.max_pool2d(a, kernel, stride)
    return (relu(a, layer.norm) if gelu else a).permute(0, 2, 3, 1)


def eager_bn_relu(x: Tensor, norm: Norm, tracked=None, relu: Callable = relu) -> Tensor:
    """`fastres.ops.bn_relu` in plain PyTorch, NHWC in and out."""
    return relu(eager_norm(x.permute(0, 3, 1, 2), norm, tracked), norm).permute(0, 2, 3, 1)


def cast(value, dtype: torch.dtype):
    """A leaf copy: activations and weights in ``dtype``, BatchNorm's vectors in fp32 at least; all need gradients."""
    if isinstance(value, Tensor):
        target = dtype if value.dim() > 1 else torch.promote_types(dtype, torch.float32)
        return value.detach().to(target).requires_grad_()
    if isinstance(value, Norm):
        wide = [None if t is None else cast(t, dtype) for t in value[:2]]
        running = [None if t is None else cast(t, dtype).detach() for t in value[2:4]]
        return Norm(*wide, *running, value.eps, act=value.act)
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


def with_grads(function: Callable, arguments: tuple, dtype: torch.dtype, dout: Tensor) -> list[Tensor]:
    """The result, the gradients of all its leaves and further results, fp64, of ``function`` computed in ``dtype``.

    Args:
        function: returns the differentiable result, or a pair of it and a list of others.
    """
    arguments = tuple(cast(argument, dtype) for argument in arguments)
    out = function(*arguments)
    out, others = out if isinstance(out, tuple) else (out, [])
    grads = torch.autograd.grad(out, leaves(*arguments), dout.to(dtype))
    return [t.detach().double() for t in (out, *grads, *others)]


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Root-mean-square error in units of the exact root-mean-square."""
    return ((actual.double() - exact).norm() / exact.norm().clamp_min(1e-300)).item()


def assert_as_good_as_eager(
    fused: Callable,
    eager: Callable,
    arguments: tuple,
    dtype: torch.dtype,
    prepare: Callable | None = None,
    rounding: torch.dtype | None = None,
) -> None:
    """Results and gradients of ``fused`` in ``dtype`` err at most twice as much as eager's, both against fp64.

    Both are given the same values: the arguments rounded to ``dtype``. A gradient of few values that errs more is
    judged over further draws of the result's gradient, see `FEW_VALUES`.

    Args:
        fused, eager: see `with_grads`.
        prepare: called first, with the arguments in fp64, which it may change in place.
        rounding: dtype whose rounding is always granted; None: ``dtype``.
    """
    arguments = rounded(arguments, dtype)
    with torch.no_grad():
        if prepare is not None:
            prepare(*arguments)
            arguments = rounded(arguments, dtype)
        out = eager(*arguments)
    out = out[0] if isinstance(out, tuple) else out
    granted, gradients = FLOOR[rounding or dtype], range(1, 1 + len(leaves(*arguments)))

    def compared() -> list[tuple[Tensor, Tensor, Tensor]]:
        """Ours, eager's and the exact one of each tensor, for a gradient of the result that is drawn."""
        dout = torch.randn_like(out).to(dtype).double()
        exact = with_grads(eager, arguments, torch.float64, dout)
        ours, theirs = with_grads(fused, arguments, dtype, dout), with_grads(eager, arguments, dtype, dout)
        assert [a.shape for a in ours] == [e.shape for e in exact]
        return list(zip(ours, theirs, exact))

    draws = [compared()]
    for index, (ours, theirs, exact) in enumerate(draws[0]):
        error, bound = _error_and_bound(ours, theirs, exact, granted)
        if error > bound and index in gradients and exact.numel() < FEW_VALUES:
            draws += [compared() for _ in range(DRAWS - len(draws))]
            pooled = (torch.cat([draw[index][which].flatten() for draw in draws]) for which in range(3))
            error, bound = _error_and_bound(*pooled, granted)
        assert error <= bound, f"tensor {index} of shape {tuple(exact.shape)}: error {error:.2e} over {bound:.2e}"


def _error_and_bound(ours: Tensor, theirs: Tensor, exact: Tensor, granted: float) -> tuple[float, float]:
    """The error of ours and the most that it may be."""
    return relative_error(ours, exact), max(2 * relative_error(theirs, exact), granted)


def rounded(arguments: tuple, dtype: torch.dtype) -> tuple:
    """fp64 leaves with the values that `cast` to ``dtype`` gives."""
    return tuple(cast(cast(argument, dtype), torch.float64) for argument in arguments)
