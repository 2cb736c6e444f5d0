"""What the tests of all kernels share: guarded memory, a checker of addresses, drawn shapes, the bar for errors.

`guarded` calls a launcher the way a test should: every argument is copied between guard bands, every tensor that the
launcher makes starts as NaN between guard bands, and afterwards all bands and all inputs must be as they were. In the
interpreter `checked_addresses` moreover looks at each load and store.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from support_fused import FLOOR, relative_error
from torch import Tensor
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle, interpreter_builder

from fastres.kernels import buffers

INTERPRETED = triton.knobs.runtime.interpret
HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALVES)
# interpreted programs take milliseconds each, so few examples; the same ones every time
few_examples = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)

_GUARD_BYTES = 64 * 1024  # a row tile of the largest kernel
# a NaN as fp32, fp16 and bf16, and not one that arithmetic makes: it would set the quiet bit
_GUARD_PATTERN = 0x7FA5


def device() -> torch.device:
    """Where kernels run in this process."""
    return torch.device("cpu" if INTERPRETED else "cuda")


def on_gpus_of(*majors: int) -> pytest.MarkDecorator:
    """The tests of kernels that have tiles for GPUs of these compute capabilities, and for the interpreter."""
    reason = "without tiles for such a GPU"
    return pytest.mark.skipif(not INTERPRETED and torch.cuda.get_device_capability()[0] not in majors, reason=reason)


# -- shapes and dtypes --


def nhwc_shapes(max_pixels: int = 200, max_channels: int = 40) -> st.SearchStrategy[tuple[int, int, int, int]]:
    """N, H, W, C: odd sizes, images of one pixel, batch 1, channels that fill no tile or just one."""
    channels = st.sampled_from([1, 3, 8, 16, 20, 24, 32]) | st.integers(1, max_channels)
    sizes = st.tuples(st.integers(1, 4), st.integers(1, 13), st.integers(1, 13), channels)
    return sizes.filter(lambda s: s[0] * s[1] * s[2] <= max_pixels)


def dtypes() -> st.SearchStrategy[torch.dtype]:
    """The dtypes of activations that kernels take."""
    return st.sampled_from(DTYPES)


def seeds() -> st.SearchStrategy[int]:
    """Seeds for the values."""
    return st.integers(0, 2**16)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device(), dtype)


def random_coef(channels: int, seed: int) -> Tensor:
    """Coefficients [5, C] of a BatchNorm whose rows belong together: mean, variance, rstd, scale, shift."""
    mean, log_var, gamma, beta = randn(4, channels, seed=seed)
    var = log_var.exp()
    rstd = (var + 1e-5).rsqrt()
    scale = gamma * rstd
    return torch.stack([mean, var, rstd, scale, beta - mean * scale])


# -- errors --


def assert_as_good(
    ours: Any,
    eager: Any,
    exact: Any,
    rounding: torch.dtype | None = None,
    terms: int = 1,
    name: str = "result",
) -> None:
    """Each tensor errs at most twice as much as eager PyTorch's, both against fp64.

    Root mean square and maximum are held to it, each in units of the exact one. Dtypes and shapes must agree, NaN
    fails. Tuples are compared part by part.

    Args:
        rounding: dtype whose rounding is always granted; the tensor's own unless given.
        terms: of the fp32 sum behind each value. Its roundings grow with the root of their number, and of results that
            nearly cancel out, or of one value alone, eager PyTorch's error can be small by luck.
    """
    if not isinstance(exact, Tensor):
        assert (ours is None) == (exact is None) and len(ours or ()) == len(exact or ()), name
        for index, trio in enumerate(zip(ours or (), eager or (), exact or ())):
            assert_as_good(*trio, rounding, terms, f"{name}[{index}]")
        return
    assert isinstance(ours, Tensor) and ours.shape == exact.shape, f"{name}: not of shape {tuple(exact.shape)}"
    assert ours.dtype == eager.dtype, f"{name}: {ours.dtype}, not {eager.dtype}"
    granted = max(FLOOR[rounding or ours.dtype], FLOOR[torch.float32] * (terms / 256) ** 0.5)
    for kind, error in (("rms", relative_error), ("largest", _largest_error)):
        got, eagers = error(ours, exact.double()), error(eager, exact.double())
        # oneDNN's weight gradient in bf16 has memory that nobody wrote where taps only ever meet padding: at times NaN.
        eagers = eagers if math.isfinite(eagers) else 0.0
        bound = max(2 * eagers, granted)
        assert got <= bound, f"{name} {tuple(exact.shape)}: {kind} error {got:.2e} over {bound:.2e}"


def _largest_error(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-300)).item()


def assert_same_bits(a: Any, b: Any) -> None:
    """Equal, NaN to NaN and the sign of zero included; tuples part by part."""
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype and torch.equal(_bytes(a), _bytes(b))
    elif a is not None or b is not None:
        assert len(a) == len(b)
        for pair in zip(a, b):
            assert_same_bits(*pair)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


# -- guarded memory --


class Guards:
    """Tensors between guard bands."""

    def __init__(self):
        self._buffers: list[tuple[Tensor, int]] = []

    def empty(self, like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Stands for `buffers.empty`: NaN, or 0xFF bytes for integers, until something is written."""
        tensor = self._fenced_bytes(shape, dtype or like.dtype, like.device)
        return (
            tensor.fill_(torch.nan)
            if tensor.is_floating_point()
            else tensor.fill_(-1 if tensor.dtype.is_signed else 255)
        )

    def copy(self, tensor: Tensor) -> Tensor:
        """A contiguous copy."""
        return self._fenced_bytes(tensor.shape, tensor.dtype, tensor.device).copy_(tensor)

    def check(self) -> None:
        """Raise AssertionError if a guard band was written to; forget the buffers."""
        buffers, self._buffers = self._buffers, []
        for buffer, size in buffers:
            for side, band in (("before", buffer[:_GUARD_BYTES]), ("behind", buffer[_GUARD_BYTES + size :])):
                assert (_pattern(len(band), band.device) == band).all(), f"write {side} a tensor of {size} bytes"

    def _fenced_bytes(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        buffer = _pattern(2 * _GUARD_BYTES + size + size % 2, device)
        self._buffers.append((buffer, size + size % 2))
        return buffer[_GUARD_BYTES : _GUARD_BYTES + size].view(dtype).view(shape)


def _pattern(size: int, device: torch.device) -> Tensor:
    return torch.full((size // 2,), _GUARD_PATTERN, dtype=torch.int16, device=device).view(torch.uint8)


def guarded(launch: Callable, *args: Any, mutates: tuple[Tensor, ...] = (), **options: Any) -> Any:
    """Result of ``launch`` on fenced copies of its tensors; fences and inputs are checked afterwards.

    Args:
        mutates: the tensors among the arguments that the launcher may write to; these receive the new values.
    """
    guards, pairs = Guards(), []

    def fenced(value: Any) -> Any:
        if isinstance(value, Tensor):
            pairs.append((value, guards.copy(value)))
            return pairs[-1][1]
        if isinstance(value, tuple):
            parts = [fenced(part) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        return value

    args, options = fenced(args), {name: fenced(value) for name, value in options.items()}
    with mock.patch.object(buffers, "empty", guards.empty), checked_addresses():
        result = launch(*args, **options)
    guards.check()
    for tensor, copy in pairs:
        if any(tensor is changed for changed in mutates):
            tensor.copy_(copy)
        else:
            assert torch.equal(_bytes(tensor), _bytes(copy)), f"an input of shape {tuple(tensor.shape)} was changed"
    return result


# -- addresses --


_checking = False


@contextmanager
def checked_addresses() -> Iterator[None]:
    """In the interpreter: fail a launch that touches memory outside its tensor arguments, or that would be a race.

    A race is an address that one program stores to and another program of the launch loads or stores. Compiled
    kernels are not looked at. Inside itself it does nothing.
    """
    global _checking
    if not INTERPRETED or _checking:
        yield
        return
    launches: list[_Launch] = []
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    call = GridExecutor.__call__

    def checked_load(self, pointers, mask, *rest, **options):
        launches[-1].load(pointers, mask)
        return load(self, pointers, mask, *rest, **options)

    def checked_store(self, pointers, value, mask, *rest, **options):
        launches[-1].store(pointers, mask)
        return store(self, pointers, value, mask, *rest, **options)

    def checked_call(self, *args, **options):
        launches.append(_Launch([*args, *options.values()]))
        try:
            return call(self, *args, **options)
        finally:
            launches.pop()

    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", checked_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", checked_store),
        mock.patch.object(GridExecutor, "__call__", checked_call),
    ):
        _checking = True
        try:
            yield
        finally:
            _checking = False


@contextmanager
def last_program_only() -> Iterator[list[tuple[int, int]]]:
    """In the interpreter: of each launch run the last program, touching no memory; loads give 0 or their default.

    Addresses are checked nevertheless, so that offsets beyond 32 bits can be tested with memory that is reserved only.

    Yields:
        The byte ranges of tensors whose last element was loaded or stored.
    """
    reached: list[tuple[int, int]] = []
    launches: list[tuple[_Launch, tuple[int, ...]]] = []
    load, call = InterpreterBuilder.create_masked_load, GridExecutor.__call__

    def no_load(self, pointers, mask, *rest, **options):
        reached.extend(launches[-1][0].ends_reached("load", pointers, mask))
        return load(self, pointers, TensorHandle(np.zeros_like(mask.data), mask.dtype), *rest, **options)

    def no_store(self, pointers, value, mask, *rest, **options):
        reached.extend(launches[-1][0].ends_reached("store", pointers, mask))

    def program_id(self, axis):
        grid = launches[-1][1]
        return TensorHandle(np.array([grid[axis] - 1 if axis < len(grid) else 0], dtype=np.int32), tl.int32)

    def call_once(self, *args, **options):
        launches.append((_Launch([*args, *options.values()]), self.grid))
        self.grid = (1,)
        try:
            return call(self, *args, **options)
        finally:
            launches.pop()

    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", no_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", no_store),
        mock.patch.object(InterpreterBuilder, "create_get_program_id", program_id),
        mock.patch.object(GridExecutor, "__call__", call_once),
        mock.patch.object(GridExecutor, "_restore_args_dev", lambda *_: None),  # copies each tensor onto itself
    ):
        yield reached


class _Launch:
    """The tensors of a launch, as byte ranges, and which program stored to which byte."""

    def __init__(self, arguments: list[Any]):
        tensors = [getattr(argument, "base", argument) for argument in arguments]  # of a tensor descriptor: its base
        self._spans: list[tuple[int, int]] = []
        for start, end in sorted(span_of(t) for t in tensors if isinstance(t, Tensor) and t.numel()):
            if self._spans and start < self._spans[-1][1]:  # views of the same memory
                start, end = self._spans[-1][0], max(end, self._spans.pop()[1])
            self._spans.append((start, end))
        self._starts, self._ends = np.array(self._spans, dtype=np.uint64).reshape(-1, 2).T
        self._writers: dict[int, np.ndarray] = {}  # by span, once it is stored to

    def load(self, pointers: Any, mask: Any) -> None:
        for span, offsets in self._located("load", pointers, mask):
            if span in self._writers:
                self._no_race("loads", self._writers[span][offsets])

    def store(self, pointers: Any, mask: Any) -> None:
        for span, offsets in self._located("store", pointers, mask):
            if span not in self._writers:
                start, end = self._spans[span]
                self._writers[span] = np.zeros(end - start, dtype=np.int64)
            self._no_race("stores to", self._writers[span][offsets])
            self._writers[span][offsets] = self._program()

    def ends_reached(self, what: str, pointers: Any, mask: Any) -> list[tuple[int, int]]:
        """Byte ranges of the tensors whose last element is among the addresses; all of them must be in some tensor."""
        width = _width(pointers)
        return [
            self._spans[span]
            for span, offsets in self._located(what, pointers, mask)
            if self._spans[span][0] + int(offsets.max()) + width == self._spans[span][1]
        ]

    def _located(self, what: str, pointers: Any, mask: Any) -> Iterator[tuple[int, np.ndarray]]:
        addresses, mask = np.broadcast_arrays(pointers.data, getattr(mask, "data", mask))
        addresses = addresses[mask.astype(bool)].astype(np.uint64)
        spans = np.searchsorted(self._starts, addresses, side="right") - 1
        inside = (spans >= 0) & (addresses + np.uint64(_width(pointers)) <= self._ends[np.maximum(spans, 0)])
        outside = addresses[~inside]
        assert not len(outside), f"{len(outside)} of {len(addresses)} addresses of a {what} are outside all tensors"
        for span in np.unique(spans):
            yield span, (addresses[spans == span] - self._starts[span]).astype(np.int64)

    def _no_race(self, what: str, writers: np.ndarray) -> None:
        conflicts = (writers != 0) & (writers != self._program())
        assert not conflicts.any(), (
            f"a program {what} {conflicts.sum()} addresses that another one of the launch stored"
        )

    def _program(self) -> int:
        x, y, z = interpreter_builder.grid_idx
        return 1 + x + (y << 20) + (z << 40)


def _width(pointers: Any) -> int:
    """Bytes of an element."""
    return max(1, pointers.get_element_ty().primitive_bitwidth // 8)


def span_of(tensor: Tensor) -> tuple[int, int]:
    """First byte and the one behind the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
