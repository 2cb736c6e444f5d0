"""The elementwise and reducing primitives of `fastres.ops.backends`, compiled: fp32 and bf16 on a CPU."""

from __future__ import annotations

import ctypes
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastres.kernels.buffers import empty, filled
from fastres.kernels.geometry import Pad, check_pool, output_hw
from fastres.kernels.types import Moments
from fastres.ops.cpu.native import call, integers, pointer

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
ACTIVATIONS = {None: 0, "relu": 1, "gelu": 2}  # as in gelu.h
# Rows that a block reads twice fit a core's second-level cache, and are few enough that fp32 sums stay accurate.
_BLOCK_BYTES, _BLOCK_ROWS = 128 * 1024, 256


def moments(y: Tensor) -> Moments:
    """Per-channel statistics of y [N, H, W, C] by blocks of rows."""
    result = new_moments(y)
    store_moments(y, None, None, result)
    return result


_counts: dict[tuple[int, int], Tensor] = {}  # rows of each block, of so many pixels by so many rows


def new_moments(y: Tensor) -> Moments:
    """Where the statistics of y's blocks of rows go; the counts are there already."""
    pixels, channels, rows = _sizes(y)
    blocks = -(-pixels // rows)
    count = _counts.get((pixels, rows))
    if count is None:
        count = _counts[pixels, rows] = filled(y, rows, blocks, dtype=torch.float32)
        count[-1] -= blocks * rows - pixels
    return Moments(count, *empty(y, 2, blocks, channels, dtype=torch.float32).unbind())


def store_moments(y: Tensor, residual: Tensor | None, out: Tensor | None, moments: Moments) -> None:
    """``out = y (+ residual)``, y itself where out is None, and what is stored there reduced to ``moments``."""
    pixels, channels, rows = _sizes(y)
    like, statistics = _pointers(y), -(-pixels // rows) * channels
    _pass(
        "moments",
        y,
        like(y),
        like(residual),
        like(out),
        pixels,
        channels,
        rows,
        _floats(moments.mean, statistics),
        _floats(moments.m2, statistics),
    )


def finalize(moments: Moments, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
    """Merge the blocks (Chan et al. 1979) in fp64; coefficients [5, C]: mean, biased variance, rstd, scale, shift."""
    blocks, channels = moments.mean.shape
    coef, gamma, beta = empty(moments.mean, 5, channels), _vector(gamma), _vector(beta)
    call(
        "finalize",
        _floats(moments.count, blocks),
        _floats(moments.mean, blocks * channels),
        _floats(moments.m2, blocks * channels),
        _floats(gamma, channels),
        _floats(beta, channels),
        eps,
        blocks,
        channels,
        _floats(coef, 5 * channels),
    )
    return coef


def running_coef(
    running_mean: Tensor, running_var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> Tensor:
    """The coefficients [5, C] of a BatchNorm by the given statistics, in fp64."""
    mean, var, gamma, beta = (_vector(t) for t in (running_mean, running_var, gamma, beta))
    assert mean is not None
    channels = mean.shape[0]
    coef = empty(mean, 5, channels)
    vectors = [_floats(vector, channels) for vector in (mean, var, gamma, beta)]
    call("running_coef", *vectors, eps, channels, _floats(coef, 5 * channels))
    return coef


def bn_add_relu(
    y: Tensor,
    coef: Tensor,
    shortcut: Tensor | None = None,
    shortcut_coef: Tensor | None = None,
    relu: bool = True,
    shortcut_stride: int = 1,
    act: str = "relu",
) -> Tensor:
    """``act(y*scale + shift + shortcut)``, see `fastres.ops.backends.protocol.Backend.bn_add_relu`."""
    if shortcut is not None and (shortcut_stride > 1 or shortcut.shape[3] != y.shape[3]):
        out, of_out, of_shortcut = torch.empty_like(y), _pointers(y), _pointers(shortcut)
        sizes = _apart(shortcut, y, shortcut_stride)
        coef_at = _floats(coef, 5 * y.shape[3])
        _pass("normalise_apart", y, of_out(y), coef_at, of_shortcut(shortcut), sizes, relu, of_out(out))
        return out
    return store_bn_add_relu(y, coef, shortcut, shortcut_coef, act if relu else None, torch.empty_like(y))


def store_bn_add_relu(
    y: Tensor, coef: Tensor, shortcut: Tensor | None, shortcut_coef: Tensor | None, act: str | None, out: Tensor
) -> Tensor:
    """`bn_add_relu` into ``out``; act None: no activation."""
    pixels, channels, rows = _sizes(y)
    like = _pointers(y)
    coefs = _floats(coef, 5 * channels), _floats(shortcut_coef, 5 * channels)
    kind = ACTIVATIONS[act]
    _pass("normalise", y, like(y), coefs[0], like(shortcut), coefs[1], kind, like(out), pixels, channels, rows)
    return out


def bn_add_relu_backward(
    dout: Tensor,
    out: Tensor | None,
    y: Tensor,
    coef: Tensor,
    shortcut: Tensor | None = None,
    shortcut_coef: Tensor | None = None,
    in_place: bool = False,
    act: str = "relu",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``dz = dout * (out > 0)`` with sums, see `fastres.ops.backends.protocol.Backend.bn_add_relu_backward`."""
    dz, sums = dout if in_place else torch.empty_like(dout), new_sums(dout)
    shortcut_sums = None if shortcut_coef is None else torch.empty_like(sums)
    second = (None, None) if shortcut_coef is None else (shortcut, shortcut_coef)
    if out is None or act == "relu":
        _backward_sums(dout, None, out, None, (y, coef), second, dz, sums=sums, second_sums=shortcut_sums)
    else:  # its gradient is of what it was of
        of, second_sums = shortcut if shortcut_coef is None else None, shortcut_sums
        given = dout, None, y, coef, (y, coef), second, dz
        _backward_sums(*given, sums=sums, second_sums=second_sums, gelu=True, shortcut=of)
    return dz, sums, shortcut_sums


def bn_sums(dz: Tensor, y: Tensor, coef: Tensor) -> Tensor:
    """``[T, 2, C]``: the sums over each block of rows of dz and of dz * xhat."""
    sums = new_sums(dz)
    _backward_sums(dz, None, None, None, (y, coef), (None, None), None, sums=sums, second_sums=None)
    return sums


def new_sums(dz: Tensor) -> Tensor:
    """[T, 2, C] for the sums of dz's blocks of rows."""
    pixels, channels, rows = _sizes(dz)
    return empty(dz, -(-pixels // rows), 2, channels, dtype=torch.float32)


def store_relu_backward(
    dx: Tensor,
    residual: Tensor | None,
    a: Tensor,
    a_coef: Tensor | None,
    below: tuple[Tensor, Tensor],
    dz: Tensor,
    sums: Tensor,
    act: str = "relu",
) -> None:
    """``dz = (dx + residual) * (relu > 0)`` and its BatchNorm's sums; the ReLU of ``a * scale + shift``, or ``a``
    itself; or through GELU of the former.
    """
    gelu = act == "gelu"
    _backward_sums(dx, residual, a, a_coef, below, (None, None), dz, sums=sums, second_sums=None, gelu=gelu)


def bn_backward_coef(sums: Tensor, coef: Tensor, count: int, training: bool) -> tuple[Tensor, Tensor, Tensor]:
    """BatchNorm's backward as ``dy = A*dz + B*y + C``, and the gradients of gamma and beta; added up in fp64."""
    blocks, _, channels = sums.shape
    abc, dgamma, dbeta = empty(sums, 3, channels), empty(sums, channels), empty(sums, channels)
    call(
        "backward_coef",
        _floats(sums, blocks * 2 * channels),
        _floats(coef, 5 * channels),
        blocks,
        channels,
        count,
        training,
        _floats(abc, 3 * channels),
        _floats(dgamma, channels),
        _floats(dbeta, channels),
    )
    return abc, dgamma, dbeta


def bn_backward_apply(dz: Tensor, y: Tensor | None, abc: Tensor, residual: Tensor | None = None) -> Tensor:
    """``A*dz + B*y + C (+ residual)``; y None: ``A*dz``, as B and C are 0."""
    out = torch.empty_like(dz)
    pixels, channels, rows = _sizes(dz)
    like, abc_at = _pointers(dz), _floats(abc, 3 * channels)
    _pass("backward_apply", dz, like(dz), like(y), abc_at, like(residual), like(out), pixels, channels, rows)
    return out


def copy(y: Tensor, out: Tensor) -> Tensor:
    """``out``, which takes y's values."""
    like = _pointers(y)
    call("copy", like(y), like(out), y.nbytes)
    return out


def add_gradient(dx: Tensor, gradient: Tensor, stride: int) -> None:
    """In place: add the first channels of a gradient to every ``stride``-th pixel of dx."""
    sizes = _apart(dx, gradient, stride)
    _pass("add_apart", dx, _pointers(gradient)(gradient), sizes, pointer(dx, gradient.dtype, dx.numel()))


def bn_relu_max_pool(
    y: Tensor, coef: Tensor, kernel: int, stride: int, pad: Pad, act: str = "relu"
) -> tuple[Tensor, Tensor]:
    """Max-pool of ``relu(y*scale + shift)``, or GELU of that of ``y*scale + shift``.

    index, uint8: the winning tap, row by row, the first among equals.

    Raises:
        ValueError: see `check_pool`.
    """
    check_pool(kernel)
    n, height, width, channels = y.shape
    out = y.new_empty(n, *output_hw((height, width), (kernel, kernel), stride, pad), channels)
    index = torch.empty_like(out, dtype=torch.uint8)
    coef_at, window = _floats(coef, 5 * channels), _window(y, out, kernel, stride, pad)
    index_at = pointer(index, torch.uint8, out.numel())
    _pass("max_pool", y, _pointers(y)(y), coef_at, ACTIVATIONS[act], window, _pointers(out)(out), index_at)
    return out, index


def max_pool(x: Tensor, kernel: int, stride: int, pad: Pad) -> Tensor:
    """Max-pool of x [N, H, W, C]; each window has a pixel of x."""
    n, height, width, channels = x.shape
    out = empty(x, n, *output_hw((height, width), (kernel, kernel), stride, pad), channels)
    _pass("plain_max_pool", x, _pointers(x)(x), _window(x, out, kernel, stride, pad), _pointers(out)(out))
    return out


def bn_relu_max_pool_backward(
    dout: Tensor, index: Tensor, y: Tensor, coef: Tensor, kernel: int, stride: int, pad: Pad, act: str = "relu"
) -> tuple[Tensor, Tensor]:
    """Gradient at BatchNorm's output, through the activation, and BatchNorm's sums."""
    dz, sums = torch.empty_like(y), new_sums(y)
    index_at, window = pointer(index, torch.uint8, dout.numel()), _window(y, dout, kernel, stride, pad)
    _pass("max_pool_backward", y, pointer(dout, y.dtype, index.numel()), index_at, window, _pointers(y)(dz))
    gelu = act == "gelu"
    _backward_sums(dz, None, y, coef, (y, coef), (None, None), dz, sums=sums, second_sums=None, gelu=gelu)
    return dz, sums


def patches(
    x: Tensor, coef: Tensor | None, like: Tensor, kernel: int, stride: int, pad: Pad, act: str = "relu"
) -> Tensor:
    """What each window of act(x*scale + shift) or x reads: [pixels of ``like``, kernel*kernel*C], 0 outside of x."""
    result = x.new_empty(like.numel() // like.shape[3], kernel * kernel * x.shape[3])
    coef_at, window = _floats(coef, 5 * x.shape[3]), _window(x, like, kernel, stride, pad)
    _pass("patches", x, _pointers(x)(x), coef_at, ACTIVATIONS[act], window, _pointers(result)(result))
    return result


def _backward_sums(
    dout: Tensor,
    residual: Tensor | None,
    ref: Tensor | None,
    ref_coef: Tensor | None,
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor | None, Tensor | None],
    dz: Tensor | None,
    *,
    sums: Tensor,
    second_sums: Tensor | None,
    gelu: bool = False,
    shortcut: Tensor | None = None,
) -> None:
    pixels, channels, rows = _sizes(dout)
    like, count = _pointers(dout), -(-pixels // rows) * 2 * channels
    _pass(
        "backward_sums",
        dout,
        like(dout),
        like(residual),
        like(ref),
        _floats(ref_coef, 5 * channels),
        gelu,
        like(shortcut),
        like(first[0]),
        _floats(first[1], 5 * channels),
        like(second[0]),
        _floats(second[1], 5 * channels),
        like(dz),
        _floats(sums, count),
        _floats(second_sums, count),
        pixels,
        channels,
        rows,
    )


def block_rows(channels: int, element_size: int) -> int:
    """Rows of a block."""
    return max(1, min(_BLOCK_ROWS, _BLOCK_BYTES // (channels * element_size)))


def _sizes(y: Tensor) -> tuple[int, int, int]:
    """Pixels, channels and rows of a block of an activation."""
    channels = y.shape[-1]
    return y.numel() // channels, channels, block_rows(channels, y.element_size())


def _window(y: Tensor, out: Tensor, kernel: int, stride: int, pad: Pad) -> ctypes.Array:
    return integers([*y.shape, *out.shape[1:3], kernel, stride, pad[0], pad[1]])


def _apart(tensor: Tensor, pixels: Tensor, stride: int) -> ctypes.Array:
    """Sizes of a tensor whose every ``stride``-th pixel is one of the other's."""
    if pixels.shape[:3] != (tensor.shape[0], *(-(-size // stride) for size in tensor.shape[1:3])):
        raise RuntimeError(f"shape {list(pixels.shape)} is not that of pixels {stride} apart of {list(tensor.shape)}")
    return integers([*tensor.shape, *pixels.shape[1:], stride])


def _vector(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def _pointers(y: Tensor) -> partial:
    """`pointer` of tensors of y's dtype and size."""
    return partial(pointer, dtype=y.dtype, size=y.numel())


def _floats(tensor: Tensor | None, size: int) -> int | None:
    return pointer(tensor, torch.float32, size)


def _pass(name: str, activations: Tensor, *arguments: Any) -> None:
    """Call the pass for the activations' dtype, in as many threads as PyTorch's own."""
    call(name, *arguments, torch.get_num_threads(), suffix=f"_{DTYPES[activations.dtype]}")
