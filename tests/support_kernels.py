"""What the tests of all kernels share: guarded memory, a checker of addresses, drawn shapes, the bar for errors.

`guarded` calls a launcher the way a test should: every argument is copied between guard bands, every tensor that the
launcher makes starts as NaN between guard bands, and afterwards all bands and all inputs must be as they were. In the
interpreter `checked_addresses` moreover looks at each load and store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from support_fused import FLOOR, relative_error
from torch import Tensor
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, interpreter_builder

from fastres.kernels import buffers

INTERPRETED = triton.knobs.runtime.interpret
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# interpreted programs take milliseconds each, so few examples; the same ones every time
few_examples = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)

_GUARD_BYTES = 64 * 1024  # a row tile of the largest kernel
_GUARD_PATTERN = (
    0x7FA5  # a NaN as fp32, fp16 and bf16, and not one that arithmetic makes: it would set the quiet bit
)


def device() -> torch.device:
    """Where kernels run in this process."""
    return torch.device("cpu" if INTERPRETED else "cuda")


# -- shapes and dtypes --------------------------------------------------------------------------------------------------


def nhwc_shapes(
    max_pixels: int = 200, max_channels: int = 40
) -> st.SearchStrategy[tuple[int, int, int, int]]:
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


# -- errors -------------------------------------------------------------------------------------------------------------


def assert_as_good(
    ours: Any, eager: Any, exact: Any, rounding: torch.dtype | None = None, name: str = "result"
) -> None:
    """Each tensor errs at most twice as much as eager PyTorch's, both against fp64.

    Root mean square and maximum are held to it, each in units of the exact one. Dtypes and shapes must agree, NaN
    fails. Tuples are compared part by part.

    Args:
        rounding: dtype whose rounding is always granted; the tensor's own unless given.
    """
    if not isinstance(exact, Tensor):
        assert (ours is None) == (exact is None) and len(ours or ()) == len(exact or ()), name
        for index, trio in enumerate(zip(ours or (), eager or (), exact or ())):
            assert_as_good(*trio, rounding, f"{name}[{index}]")
        return
    assert isinstance(ours, Tensor) and ours.shape == exact.shape, (
        f"{name}: not of shape {tuple(exact.shape)}"
    )
    assert ours.dtype == eager.dtype, f"{name}: {ours.dtype}, not {eager.dtype}"
    for kind, error in (("rms", relative_error), ("largest", _largest_error)):
        got, eagers = error(ours, exact.double()), error(eager, exact.double())
        bound = max(2 * eagers, FLOOR[rounding or ours.dtype])
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


# -- guarded memory -----------------------------------------------------------------------------------------------------


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
                assert (_pattern(len(band), band.device) == band).all(), (
                    f"write {side} a tensor of {size} bytes"
                )

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
            assert torch.equal(_bytes(tensor), _bytes(copy)), (
                f"an input of shape {tuple(tensor.shape)} was changed"
            )
    return result


# -- addresses ----------------------------------------------------------------------------------------------------------


@contextmanager
def checked_addresses() -> Iterator[None]:
    """In the interpreter: fail a launch that touches memory outside its tensor arguments, or that would be a race.

    A race is an address that one program stores to and another program of the launch loads or stores. Compiled
    kernels are not looked at.
    """
    if not INTERPRETED:
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
        yield


class _Launch:
    """The tensors of a launch, as byte ranges, and which program stored to which byte."""

    def __init__(self, arguments: list[Any]):
        tensors = [
            getattr(argument, "base", argument) for argument in arguments
        ]  # of a tensor descriptor: its base
        spans = sorted({_span(t) for t in tensors if isinstance(t, Tensor) and t.numel()})
        self._starts = np.array([start for start, _ in spans], dtype=np.uint64)
        self._ends = np.array([end for _, end in spans], dtype=np.uint64)
        self._writers = [np.zeros(end - start, dtype=np.int64) for start, end in spans]

    def load(self, pointers: Any, mask: Any) -> None:
        for span, offsets in self._located("load", pointers, mask):
            writers = self._writers[span][offsets]
            self._no_race("loads", pointers, (writers != 0) & (writers != self._program()))

    def store(self, pointers: Any, mask: Any) -> None:
        for span, offsets in self._located("store", pointers, mask):
            writers, program = self._writers[span], self._program()
            self._no_race("stores to", pointers, (writers[offsets] != 0) & (writers[offsets] != program))
            writers[offsets] = program

    def _located(self, what: str, pointers: Any, mask: Any) -> Iterator[tuple[int, np.ndarray]]:
        addresses, mask = np.broadcast_arrays(pointers.data, getattr(mask, "data", mask))
        addresses = addresses[mask.astype(bool)].astype(np.uint64)
        width = np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
        spans = np.searchsorted(self._starts, addresses, side="right") - 1
        inside = (spans >= 0) & (addresses + width <= self._ends[np.maximum(spans, 0)])
        outside = addresses[~inside]
        assert not len(outside), (
            f"{len(outside)} of {len(addresses)} addresses of a {what} are outside all tensors"
        )
        for span in np.unique(spans):
            yield span, (addresses[spans == span] - self._starts[span]).astype(np.int64)

    def _no_race(self, what: str, pointers: Any, conflicts: np.ndarray) -> None:
        assert not conflicts.any(), (
            f"a program {what} {conflicts.sum()} addresses that another one of the launch stored"
        )

    def _program(self) -> int:
        x, y, z = interpreter_builder.grid_idx
        return 1 + x + (y << 20) + (z << 40)


def _span(tensor: Tensor) -> tuple[int, int]:
    """First byte and the one behind the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
