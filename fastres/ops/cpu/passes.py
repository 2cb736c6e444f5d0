"""The elementwise and reducing primitives of `fastres.ops.aten`, compiled: fp32 and bf16 activations on a CPU."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastres.kernels.geometry import Pad, is_pointwise, output_hw
from fastres.kernels.types import Moments
from fastres.ops import aten
from fastres.ops.cpu.build import library
from fastres.ops.library import add_shortcut

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
# Rows that a block reads twice fit a core's second-level cache, and are few enough that fp32 sums stay accurate.
_BLOCK_BYTES, _BLOCK_ROWS = 128 * 1024, 256

running_coef = aten.running_coef
global_avg_pool = aten.global_avg_pool
global_avg_pool_backward = aten.global_avg_pool_backward


def moments(y: Tensor) -> Moments:
    """Per-channel statistics of y [N, H, W, C] by blocks of rows."""
    result = new_moments(y)
    store_moments(y, None, None, result)
    return result


def new_moments(y: Tensor) -> Moments:
    """Where the statistics of y's blocks of rows go; the counts are there already."""
    pixels, channels, rows = _sizes(y)
    count = _counts(pixels, rows)
    return Moments(count, *torch.empty(2, count.shape[0], channels).unbind())


@cache
def _counts(pixels: int, rows: int) -> Tensor:
    """Rows of each block."""
    count = torch.full((-(-pixels // rows),), float(rows))
    count[-1] -= count.shape[0] * rows - pixels
    return count


def store_moments(y: Tensor, residual: Tensor | None, out: Tensor | None, moments: Moments) -> None:
    """``out = y (+ residual)``, y itself where out is None, and what is stored there reduced to ``moments``."""
    pixels, channels, rows = _sizes(y)
    _pass("moments", y, residual, out, pixels, channels, rows, moments.mean, moments.m2)


def finalize(moments: Moments, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
    """Merge the blocks (Chan et al. 1979) in fp64; coefficients [5, C]: mean, biased variance, rstd, scale, shift."""
    blocks, channels = moments.mean.shape
    coef, gamma, beta = torch.empty(5, channels), _vector(gamma), _vector(beta)
    _call("finalize", *moments, gamma, beta, eps, blocks, channels, coef)
    return coef


def bn_add_relu(
    y: Tensor,
    coef: Tensor,
    shortcut: Tensor | None = None,
    shortcut_coef: Tensor | None = None,
    relu: bool = True,
    shortcut_stride: int = 1,
) -> Tensor:
    """``relu(y*scale + shift + shortcut)``, see `fastres.ops.aten.bn_add_relu`."""
    if shortcut is not None and (shortcut_stride > 1 or shortcut.shape[3] != y.shape[3]):
        out = bn_add_relu(y, coef, relu=False)
        add_shortcut(out, shortcut, shortcut_stride)
        return out.relu_() if relu else out
    return store_bn_add_relu(y, coef, shortcut, shortcut_coef, relu, torch.empty_like(y))


def store_bn_add_relu(
    y: Tensor, coef: Tensor, shortcut: Tensor | None, shortcut_coef: Tensor | None, relu: bool, out: Tensor
) -> Tensor:
    """`bn_add_relu` into ``out``."""
    pixels, channels, rows = _sizes(y)
    _pass("normalise", y, coef, shortcut, shortcut_coef, relu, out, pixels, channels, rows)
    return out


def bn_add_relu_backward(
    dout: Tensor,
    out: Tensor | None,
    y: Tensor,
    coef: Tensor,
    shortcut: Tensor | None = None,
    shortcut_coef: Tensor | None = None,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``dz = dout * (out > 0)`` with sums, see `fastres.ops.aten.bn_add_relu_backward`."""
    dz, sums = dout if in_place else torch.empty_like(dout), new_sums(dout)
    shortcut_sums = None if shortcut_coef is None else torch.empty_like(sums)
    second = (None, None) if shortcut_coef is None else (shortcut, shortcut_coef)
    _backward_sums(dout, None, out, None, (y, coef), second, dz, sums, shortcut_sums)
    return dz, sums, shortcut_sums


def bn_sums(dz: Tensor, y: Tensor, coef: Tensor) -> Tensor:
    """``[T, 2, C]``: the sums over each block of rows of dz and of dz * xhat."""
    sums = new_sums(dz)
    _backward_sums(dz, None, None, None, (y, coef), (None, None), None, sums, None)
    return sums


def new_sums(dz: Tensor) -> Tensor:
    """[T, 2, C] for the sums of dz's blocks of rows."""
    pixels, channels, rows = _sizes(dz)
    return torch.empty(-(-pixels // rows), 2, channels)


def store_relu_backward(
    dx: Tensor,
    residual: Tensor | None,
    a: Tensor,
    a_coef: Tensor | None,
    below: tuple[Tensor, Tensor],
    dz: Tensor,
    sums: Tensor,
) -> None:
    """``dz = (dx + residual) * (relu > 0)`` and its BatchNorm's sums; the ReLU of ``a * scale + shift``, or ``a`` itself."""
    _backward_sums(dx, residual, a, a_coef, below, (None, None), dz, sums, None)


def bn_backward_coef(
    sums: Tensor, coef: Tensor, gamma: Tensor | None, count: int, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """BatchNorm's backward as ``dy = A*dz + B*y + C``, and the gradients of gamma and beta; added up in fp64."""
    blocks, _, channels = sums.shape
    abc, dgamma, dbeta = torch.empty(3, channels), torch.empty(channels), torch.empty(channels)
    _call("backward_coef", sums, coef, blocks, channels, float(count), training, abc, dgamma, dbeta)
    return abc, dgamma, dbeta


def bn_backward_apply(dz: Tensor, y: Tensor | None, abc: Tensor, residual: Tensor | None = None) -> Tensor:
    """``A*dz + B*y + C (+ residual)``; y None: ``A*dz``, as B and C are 0."""
    out = torch.empty_like(dz)
    pixels, channels, rows = _sizes(dz)
    _pass("backward_apply", dz, y, abc, residual, out, pixels, channels, rows)
    return out


def bn_relu_max_pool(y: Tensor, coef: Tensor, kernel: int, stride: int, pad: Pad) -> tuple[Tensor, Tensor]:
    """Max-pool of ``relu(y*scale + shift)``; index uint8: the winning tap, row by row, the first among equals."""
    n, height, width, channels = y.shape
    out = y.new_empty(n, *output_hw((height, width), (kernel, kernel), stride, pad), channels)
    index = torch.empty_like(out, dtype=torch.uint8)
    _pass("max_pool", y, coef, _window(y, out, kernel, stride, pad), out, index)
    return out, index


def bn_relu_max_pool_backward(
    dout: Tensor, index: Tensor, y: Tensor, coef: Tensor, kernel: int, stride: int, pad: Pad
) -> tuple[Tensor, Tensor]:
    """Gradient at BatchNorm's output, masked by the ReLU, and BatchNorm's sums."""
    dz, sums = torch.empty_like(y), new_sums(y)
    window = _window(y, dout, kernel, stride, pad)
    _pass("max_pool_backward", dout, index, window, dz)
    _backward_sums(dz, None, y, coef, (y, coef), (None, None), dz, sums, None)
    return dz, sums


def patches(x: Tensor, coef: Tensor | None, like: Tensor, kernel: int, stride: int, pad: Pad) -> Tensor:
    """What each window of relu(x*scale + shift) or x reads: [pixels of ``like``, kernel*kernel*C], 0 outside of x."""
    result = x.new_empty(like.numel() // like.shape[3], kernel * kernel * x.shape[3])
    _pass("patches", x, coef, _window(x, like, kernel, stride, pad), result)
    return result


@cache
def has_weight_grad() -> bool:
    """Whether `weight_grad` is there: on CPUs with AVX512-BF16 and without AMX."""
    function = library().fastres_has_weight_grad
    function.restype = ctypes.c_bool
    return function()


def weight_grad(x: Tensor, coef: Tensor | None, dy: Tensor, w: Tensor, stride: int, pad: Pad) -> Tensor:
    """Gradient in fp32 of w [K, KH, KW, C] in the convolution of relu(x*scale + shift) or x, all bf16."""
    (n, height, width, channels), (_, out_height, out_width, outputs) = x.shape, dy.shape
    pitch = [height * width * channels, width * channels, channels]
    if is_pointwise(w.shape[1:3], pad):  # as one without stride over the pixels that it reads
        height, width, stride, pitch = out_height, out_width, 1, [pitch[0], pitch[1] * stride, pitch[2] * stride]
    sizes = [n, height, width, channels, *pitch, out_height, out_width, outputs, *w.shape[1:3], stride, *pad[:2]]
    dw = torch.empty(w.shape)
    _call("weight_grad", x, coef, dy, torch.tensor(sizes), dw, torch.get_num_threads())
    return dw


def _backward_sums(
    dout: Tensor,
    residual: Tensor | None,
    ref: Tensor | None,
    ref_coef: Tensor | None,
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor | None, Tensor | None],
    dz: Tensor | None,
    sums: Tensor,
    second_sums: Tensor | None,
) -> None:
    pixels, channels, rows = _sizes(dout)
    _pass(
        "backward_sums", dout, residual, ref, ref_coef, *first, *second, dz, sums, second_sums, pixels, channels, rows
    )


def block_rows(channels: int, element_size: int) -> int:
    """Rows of a block."""
    return max(1, min(_BLOCK_ROWS, _BLOCK_BYTES // (channels * element_size)))


def _sizes(y: Tensor) -> tuple[int, int, int]:
    """Pixels, channels and rows of a block of an activation."""
    channels = y.shape[-1]
    return y.numel() // channels, channels, block_rows(channels, y.element_size())


def _window(y: Tensor, out: Tensor, kernel: int, stride: int, pad: Pad) -> Tensor:
    return torch.tensor([*y.shape, *out.shape[1:3], kernel, stride, pad[0], pad[1]])


def _vector(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def _pass(name: str, activations: Tensor, *rest: Any) -> None:
    """Call the pass for the activations' dtype, in as many threads as PyTorch's own."""
    _call(f"{name}_{DTYPES[activations.dtype]}", activations, *rest, torch.get_num_threads())


def _call(name: str, *arguments: Any) -> None:
    """Call a function of the library; tensors are contiguous, None is a null pointer."""
    function = _functions.get(name) or _declared(name, arguments)
    function(*[_address(argument) if isinstance(argument, Tensor) else argument for argument in arguments])


def _address(tensor: Tensor) -> int:
    assert tensor.is_contiguous()
    return tensor.data_ptr()


_C_TYPES = {int: ctypes.c_int64, float: ctypes.c_double, bool: ctypes.c_bool}
_functions: dict[str, Any] = {}


def _declared(name: str, arguments: tuple) -> Any:
    """The function, its arguments' types told once by the first call's."""
    function = getattr(library(), f"fastres_{name}")
    function.restype = None
    function.argtypes = [_C_TYPES.get(type(argument), ctypes.c_void_p) for argument in arguments]
    _functions[name] = function
    return function
