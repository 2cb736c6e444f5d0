"""Repair of Triton's interpreter, of its bfloat16 above all, where it is broken; kernels on a GPU need and get none.

The interpreter keeps bfloat16 as its 16 bits in an integer array. As of Triton 3.8 it multiplies those integers in
``tl.dot`` and truncates when it rounds fp32 to bfloat16. Both are probed, so a release that computes them correctly is
left alone. Arithmetic on bfloat16 outside ``tl.dot`` stays wrong: kernels widen to fp32 right after a load. Triton 3.6
with a NumPy of 2.4 or later has one more defect: no loop takes its bound from an argument.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def install() -> None:
    """Repair what the probes find wrong; nothing in a process whose kernels are compiled."""
    if not triton.knobs.runtime.interpret:
        return
    if not loops():
        _repair_loops()
    if not rounds_to_nearest():
        _repair_rounding()
    if not multiplies():
        _repair_dot()


def loops() -> bool:
    """Whether a loop can take its bound from an argument."""
    total = torch.zeros(1)
    try:
        _count[(1,)](total, 3)
    except InterpreterError:
        return False
    return total.item() == 3


def rounds_to_nearest() -> bool:
    """Whether the interpreter rounds fp32 to bfloat16 as PyTorch does."""
    values = torch.tensor([1 + 3 / 256, 1 + 1 / 256, -1.0078, 3e38, 1e-40, 0.0, torch.inf, torch.nan])
    rounded = torch.zeros(len(values), dtype=torch.bfloat16)
    _round[(1,)](values, rounded, COUNT=len(values))
    return torch.allclose(rounded, values.bfloat16(), rtol=0, atol=0, equal_nan=True)


def multiplies() -> bool:
    """Whether the interpreter's ``tl.dot`` multiplies bfloat16 values."""
    a = torch.arange(256).view(16, 16).bfloat16()
    product = torch.zeros(16, 16)
    _multiply[(1,)](a, product)
    return torch.equal(product, a.float() @ a.float())


@triton.jit
def _count(out_ptr, bound):
    total = 0.0
    for _ in range(bound):
        total += 1.0
    tl.store(out_ptr, total)


@triton.jit
def _round(x_ptr, out_ptr, COUNT: tl.constexpr):
    offset = tl.arange(0, COUNT)
    tl.store(out_ptr + offset, tl.load(x_ptr + offset).to(tl.bfloat16))


@triton.jit
def _multiply(a_ptr, out_ptr):
    index = tl.arange(0, 16)
    offset = index[:, None] * 16 + index[None, :]
    a = tl.load(a_ptr + offset)
    tl.store(out_ptr + offset, tl.dot(a, a))


def _repair_loops() -> None:
    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor, *rest):
        patch(tensor, *rest)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor


def _repair_rounding() -> None:
    cast, cast_with_mode = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp

    def converted(handle: TensorHandle, target: tl.dtype) -> TensorHandle | None:
        before, after = handle.dtype.scalar, target.scalar
        if (before, after) == (tl.bfloat16, tl.float32):
            return _widened(handle)
        if (before, after) == (tl.float32, tl.bfloat16):
            return TensorHandle(_narrowed(handle.data), tl.bfloat16)
        return None

    # never `converted(...) or cast(...)`: a handle is true when all its elements are
    def cast_impl(self, handle, target):
        result = converted(handle, target)
        return cast(self, handle, target) if result is None else result

    def create_fp_to_fp(self, handle, target, mode):
        result = converted(handle, target)
        return cast_with_mode(self, handle, target, mode) if result is None else result

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp = cast_impl, create_fp_to_fp


def _repair_dot() -> None:
    dot = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):
        return dot(self, _widened(a), _widened(b), *rest)

    InterpreterBuilder.create_dot = create_dot


def _widened(handle: TensorHandle) -> TensorHandle:
    """The handle with its bfloat16 bits as fp32; any other as it is."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _narrowed(values: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16, ties to even; NaN as the quiet NaN."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    nearest = (bits + (bits >> 16 & 1) + np.uint32(0x7FFF)) >> 16
    return np.where(np.isnan(values), 0x7FC0, nearest).astype(np.uint16)
