"""Negative controls: what the guards and the interpreter's repair are there to catch, they catch."""

import pytest
import torch
import triton
import triton.language as tl
from interpreter_bf16 import loops, multiplies, rounds_to_nearest
from support_kernels import INTERPRETED, assert_as_good, device, guarded, randn
from triton.runtime.errors import InterpreterError

from fastres.kernels import buffers

interpreted = pytest.mark.skipif(not INTERPRETED, reason="compiled kernels' addresses are not seen")


@triton.jit
def _copy_kernel(x_ptr, out_ptr, first, count, SIZE: tl.constexpr):
    """``out[first:count] = x[first:count]``, SIZE elements a program from ``first`` on."""
    offset = first + tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out_ptr + offset, tl.load(x_ptr + offset, mask=offset < count), mask=offset < count)


def copy(x, first=0, count=None, programs=1):
    out = buffers.empty(x, *x.shape)
    _copy_kernel[(programs,)](x, out, first, x.numel() if count is None else count, SIZE=32)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8], ids=str)
def test_a_correct_kernel_passes(dtype):
    x = (100 * randn(5, 3, seed=0)).to(dtype)
    assert torch.equal(guarded(copy, x), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_an_unwritten_element_is_seen(dtype):
    x = (100 * randn(20, seed=0).abs()).to(dtype)
    assert not torch.equal(guarded(copy, x, count=19), x)


@pytest.mark.parametrize("wrong", [{"count": 21}, {"first": -1}], ids=str)
def test_a_write_outside_is_seen(wrong):
    with pytest.raises(AssertionError, match="write b(efore|ehind) a tensor of 80 bytes"):
        guarded(double, randn(20, seed=0), **wrong)


@interpreted
@pytest.mark.parametrize("wrong", [{"count": 21}, {"first": -1}], ids=str)
def test_a_read_outside_is_seen_in_the_interpreter(wrong):
    with pytest.raises(InterpreterError, match="1 of 2[01] addresses of a load are outside all tensors"):
        guarded(copy, randn(20, seed=0), **wrong)


@triton.jit
def _double_kernel(x_ptr, out_ptr, whole_x_ptr, whole_out_ptr, first, count, SIZE: tl.constexpr):
    """``out[first:count] = 2*x[first:count]``: arithmetic, which changes the bits of a guard band that it reads.

    The storages with the bands are arguments too, so the checker of addresses has nothing to say.
    """
    offset = first + tl.arange(0, SIZE)
    tl.store(out_ptr + offset, 2 * tl.load(x_ptr + offset, mask=offset < count), mask=offset < count)


def double(x, first=0, count=None, programs=1):
    out = buffers.empty(x, *x.shape)
    whole = (torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage()) for t in (x, out))
    _double_kernel[(programs,)](x, out, *whole, first, x.numel() if count is None else count, SIZE=32)
    return out


@interpreted
def test_a_race_is_seen():
    with pytest.raises(InterpreterError, match="stores to 20 addresses that another one of the launch stored"):
        guarded(double, randn(20, seed=0), programs=2)


def test_a_changed_input_is_seen():
    x = torch.zeros(4, device=device())
    with pytest.raises(AssertionError, match=r"an input of shape \(4,\) was changed"):
        guarded(torch.Tensor.add_, x, 1)
    guarded(torch.Tensor.add_, x, 1, mutates=(x,))
    assert x.tolist() == [1] * 4


def test_the_bar_for_errors():
    exact = randn(50, 3, seed=0).double()
    eager, poor, spoiled = exact.bfloat16(), exact.bfloat16() * 1.05, exact.bfloat16()
    spoiled[7, 1] += 0.1
    assert_as_good((eager, None), (eager, None), (exact, None))
    for wrong in (poor, spoiled, torch.full_like(eager, torch.nan), None):
        with pytest.raises(AssertionError):
            assert_as_good((wrong, None), (eager, None), (exact, None))


@interpreted
def test_the_interpreter_is_repaired():
    assert loops() and rounds_to_nearest() and multiplies()
