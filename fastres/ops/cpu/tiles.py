"""Convolutions in bf16 by our own tiles (conv.h): outputs, data gradients and folded ones in a call each."""

from __future__ import annotations

import ctypes
import os
from functools import cache, lru_cache

import torch
from torch import Tensor

from fastres.kernels import buffers
from fastres.kernels.geometry import Pad, output_hw
from fastres.kernels.types import Moments
from fastres.ops.cpu.native import answer, call, integers, pointer

FORMS = {"plain": 0, "avx512": 1, "amx": 2}
BF16 = torch.bfloat16
_COLUMNS, _USED = 16, 0.6  # the weight gradient's channels fill vectors; oneDNN is faster where less of them is used
Sizes = tuple[int, ...]


@cache
def form() -> int | None:
    """The form of tiles that convolutions in bf16 are made of; None: none, PyTorch's convolutions run.

    It is the best that the CPU has instructions for, or what ``FASTRES_TILES`` says: a name of `FORMS` or ``none``.

    Raises:
        ValueError: for another name, or a form whose instructions this CPU lacks.
    """
    best, name = answer("form"), os.environ.get("FASTRES_TILES")
    if name is None:
        return best or None
    usable = [known for known, number in FORMS.items() if number <= best]
    if name not in (*usable, "none"):
        raise ValueError(f"FASTRES_TILES is {name!r}: choose {', '.join(usable)} or none on this CPU")
    return FORMS.get(name)


def takes(dtype: torch.dtype) -> bool:
    """Whether convolutions of this dtype are made of tiles."""
    return dtype == BF16 and form() is not None


def takes_weight_grad(x: Tensor, coef: Tensor | None, dilation: int) -> bool:
    """Whether the weight's gradient of a convolution is: not where few channels leave most of a tile unused."""
    channels = x.shape[3]
    if not takes(x.dtype):
        return False
    as_rows = form() != FORMS["plain"] and channels <= _few_channels() and coef is None and dilation == 1
    return as_rows or channels > _USED * (-(-channels // _COLUMNS) * _COLUMNS)


@cache
def _few_channels() -> int:
    """The most channels of an input that the weight's gradient takes as rows."""
    return answer("few_channels")


def _form() -> int:
    chosen = form()
    return FORMS["plain"] if chosen is None else chosen


def sizes(x_shape: Sizes, w_shape: Sizes, stride: int, pad: Pad, dilation: int) -> Sizes:
    """Sizes of a convolution of x [N, H, W, C] with w [K, KH, KW, C], as conv.h has them."""
    n, height, width, channels = x_shape
    outputs, *kernel = w_shape[:3]
    out = output_hw((height, width), (kernel[0], kernel[1]), stride, pad, dilation)
    return n, height, width, channels, *out, outputs, *kernel, stride, *pad[:2], dilation


@lru_cache(maxsize=4096)
def _native(problem: Sizes) -> ctypes.Array:
    return integers(problem)


@lru_cache(maxsize=4096)
def _packed_size(problem: Sizes, transposed: bool, form: int) -> int:
    return answer("packed_size", form, _native(problem), transposed)


@lru_cache(maxsize=4096)
def _counts(problem: Sizes, transposed: bool, form: int) -> Tensor:
    """Pixels of each unit."""
    counts = torch.empty(answer("units", form, _native(problem), transposed), dtype=torch.float32, device="cpu")
    call("unit_pixels", form, _native(problem), transposed, pointer(counts, torch.float32, counts.numel()))
    return counts


def packed(w: Tensor, problem: Sizes, transposed: bool = False) -> Tensor:
    """The weight [K, KH, KW, C], in bf16 or rounded from fp32, as the products take it."""
    single = w.dtype == torch.float32
    result = buffers.empty(w, _packed_size(problem, transposed, _form()), dtype=BF16)
    call(
        "pack",
        _form(),
        _native(problem),
        transposed,
        pointer(w, torch.float32 if single else BF16, w.numel()),
        single,
        pointer(result, BF16, result.numel()),
        torch.get_num_threads(),
    )
    return result


def conv(
    x: Tensor,
    w: Tensor,
    stride: int,
    pad: Pad,
    dilation: int = 1,
    coef: Tensor | None = None,
    residual: Tensor | None = None,
    moments: bool = True,
    *,
    shortcut: Tensor | None = None,
    shortcut_coef: Tensor | None = None,
    out: Tensor | None = None,
    act: str = "relu",
) -> tuple[Tensor, Moments | None]:
    """``y = conv2d(act(x*scale + shift (+ shortcut)), w) (+ residual)`` and the statistics of y.

    Without ``coef`` x is taken as it is. What is made of x and the shortcut, itself normalised where it has
    coefficients, is stored in ``out``; that is for pointwise convolutions without stride.
    """
    problem = sizes(x.shape, w.shape, stride, pad, dilation)
    n, height, width, channels, out_height, out_width, outputs = problem[:7]
    y = buffers.empty(x, n, out_height, out_width, outputs)
    statistics, mean, m2 = None, None, None
    if moments:
        counts = _counts(problem, False, _form())
        statistics = Moments(counts, *buffers.empty(x, 2, len(counts), outputs, dtype=torch.float32).unbind())
        mean, m2 = (pointer(t, torch.float32, len(counts) * outputs) for t in statistics[1:])
    call(
        "conv",
        _form(),
        _native(problem),
        pointer(x, BF16, n * height * width * channels),
        pointer(coef, torch.float32, 5 * channels),
        act == "gelu",
        pointer(shortcut, BF16, x.numel()),
        pointer(shortcut_coef, torch.float32, 5 * channels),
        pointer(out, BF16, x.numel()),
        pointer(weights := packed(w, problem), BF16, weights.numel()),
        pointer(residual, BF16, y.numel()),
        pointer(y, BF16, y.numel()),
        mean,
        m2,
        torch.get_num_threads(),
    )
    return y, statistics


def folded_conv(
    x: Tensor,
    weights: Tensor,
    problem: Sizes,
    bias: Tensor,
    residual: Tensor | None = None,
    relu: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """``relu(conv2d(x, w) + bias (+ residual))`` with `packed` weights and a bias in fp32.

    Args:
        out: where the result goes, which may be the residual's memory, but not that of x.
    """
    n, height, width, channels, out_height, out_width, outputs = problem[:7]
    y = buffers.empty(x, n, out_height, out_width, outputs) if out is None else out
    call(
        "folded_conv",
        _form(),
        _native(problem),
        pointer(x, BF16, n * height * width * channels),
        pointer(weights, BF16, _packed_size(problem, False, _form())),
        pointer(bias, torch.float32, outputs),
        pointer(residual, BF16, y.numel()),
        relu,
        pointer(y, BF16, y.numel()),
        torch.get_num_threads(),
    )
    return y


def _gradient(
    dz: Tensor, y: Tensor | None, abc: Tensor | None, problem: Sizes
) -> tuple[int | None, int | None, int | None]:
    """Pointers to what dy, ``A*dz + B*y + C``, is made of; without ``abc`` y is not read."""
    n, _, _, _, out_height, out_width, outputs = problem[:7]
    size = n * out_height * out_width * outputs
    read = None if abc is None else y
    return pointer(dz, BF16, size), pointer(read, BF16, size), pointer(abc, torch.float32, 3 * outputs)


def data_grad(
    dz: Tensor,
    y: Tensor | None,
    abc: Tensor | None,
    w: Tensor,
    problem: Sizes,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    mask_coef: Tensor | None = None,
    *,
    act: str = "relu",
    below: tuple[Tensor, Tensor] | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The gradient at a convolution's input of ``dy = A*dz + B*y + C``, or ``A*dz``, or dz, and its BatchNorm's sums.

    The residual is added; what the ReLU of ``mask * scale + shift``, or of a mask without coefficients, did not let
    through becomes 0, or the gradient goes through GELU of the former. The sums [T, 2, C] are those of the BatchNorm
    ``below = (y, coef)``.

    Args:
        out: where the gradient goes, which may be the residual's memory, but not that of dz.
    """
    n, height, width, channels = problem[:4]
    dx = buffers.empty(dz, n, height, width, channels) if out is None else out
    sums, below_y, below_coef = None, None, None
    if below is not None:
        units = len(_counts(problem, True, _form()))
        sums = buffers.empty(dz, units, 2, channels, dtype=torch.float32)
        below_y, below_coef = below
    call(
        "data_grad",
        _form(),
        _native(problem),
        *_gradient(dz, y, abc, problem),
        pointer(weights := packed(w, problem, True), BF16, weights.numel()),
        pointer(residual, BF16, dx.numel()),
        pointer(mask, BF16, dx.numel()),
        pointer(mask_coef, torch.float32, 5 * channels),
        act == "gelu" and mask_coef is not None,
        pointer(below_y, BF16, dx.numel()),
        pointer(below_coef, torch.float32, 5 * channels),
        pointer(dx, BF16, dx.numel()),
        pointer(sums, torch.float32, 0 if sums is None else sums.numel()),
        torch.get_num_threads(),
    )
    return dx, sums


def weight_grad(
    x: Tensor,
    coef: Tensor | None,
    dz: Tensor,
    y: Tensor | None,
    abc: Tensor | None,
    problem: Sizes,
    act: str = "relu",
) -> Tensor:
    """Gradient in fp32 of w [K, KH, KW, C] in the convolution of act(x*scale + shift) or x, of `data_grad`'s dy."""
    n, height, width, channels = problem[:4]
    dw = buffers.empty(x, *problem[6:9], channels, dtype=torch.float32)
    call(
        "weight_grad",
        _form(),
        _native(problem),
        *_gradient(dz, y, abc, problem),
        pointer(x, BF16, n * height * width * channels),
        pointer(coef, torch.float32, 5 * channels),
        act == "gelu",
        pointer(dw, torch.float32, dw.numel()),
        torch.get_num_threads(),
    )
    return dw
