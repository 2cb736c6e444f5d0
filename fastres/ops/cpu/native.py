"""Calls of the compiled passes: here, and nowhere else, a tensor becomes an address.

A `Recorder` is told of every tensor whose address is taken and of every call, see `fastres.ops.cpu.tape`.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from fastres.ops.cpu.build import library

# What each function takes, in C++: p a pointer to what it reads, o to what it may write, i int64, d double, b bool.
SIGNATURES = {
    "finalize": "pppppdiio",
    "running_coef": "ppppdio",
    "backward_coef": "ppiidbooo",
    "copy": "poi",
    "moments": "ppoiiiooi",
    "normalise": "ppppioiiii",
    "normalise_apart": "ppppboi",
    "add_apart": "ppoi",
    "backward_sums": "ppppbpppppoooiiii",
    "backward_apply": "ppppoiiii",
    "max_pool": "ppipooi",
    "plain_max_pool": "ppoi",
    "max_pool_backward": "pppoi",
    "patches": "ppipoi",
    "weight_grad": "ippppppboi",
    "unit_pixels": "ipbo",
    "pack": "ipbpboi",
    "conv": "ipppbppoppoooi",
    "folded_conv": "ipppppboi",
    "data_grad": "ippppppppbppooi",
    "update_running": "pipid",
    "sgd": "piddbddi",
    "program": "pip",
}
# What returns an int64.
_ANSWERS = {"form": "", "few_channels": "", "units": "ipb", "packed_size": "ipb"}
_TYPES = {"p": ctypes.c_void_p, "o": ctypes.c_void_p, "i": ctypes.c_int64, "d": ctypes.c_double, "b": ctypes.c_bool}
_functions: dict[str, Any] = {}


class Recorder(Protocol):
    """Who is told what happens in a thread."""

    def address_taken(self, tensor: Tensor, address: int) -> None:
        """A tensor is an argument of the next call."""

    def called(self, name: str, arguments: Sequence[Any], suffix: str) -> None:
        """A function was called."""


class _Thread(threading.local):
    recorder: Recorder | None = None


_thread = _Thread()


@contextmanager
def recorded_by(recorder: Recorder) -> Iterator[None]:
    """In this context the recorder is told of all that this thread calls."""
    _thread.recorder = recorder
    try:
        yield
    finally:
        _thread.recorder = None


def pointer(tensor: Tensor | None, dtype: torch.dtype, size: int) -> int | None:
    """Address of a dense CPU tensor of this dtype with at least ``size`` elements; None for None.

    Raises:
        RuntimeError: for any other tensor: the passes would read or write memory that is not its own.
    """
    if tensor is None:
        return None
    if (
        tensor.dtype is dtype
        and tensor.is_cpu
        and tensor.is_contiguous()
        and tensor.numel() >= size
        and ((address := tensor.data_ptr()) or not size)
    ):
        if (recorder := _thread.recorder) is not None:
            recorder.address_taken(tensor, address)
        return address
    raise RuntimeError(
        f"a compiled pass takes a contiguous {dtype} tensor of at least {size} elements on the CPU, but got a "
        f"{type(tensor).__name__} of {tensor.dtype}, shape {list(tensor.shape)}, on {tensor.device}, "
        f"strides {list(tensor.stride())}: run it with fastres.ops.implementation('aten')"
    )


def is_float32(tensor: Tensor) -> bool:
    """Whether a pass may change this tensor where it lies, apart from its class and its strides."""
    return (
        tensor.dtype is torch.float32 and tensor.is_cpu and tensor.layout is torch.strided and not tensor.is_inference()
    )


def integers(values: Sequence[int]) -> ctypes.Array:
    """int64 values where a function takes a pointer to them."""
    return (ctypes.c_int64 * len(values))(*values)


def call(name: str, *arguments: Any, suffix: str = "") -> None:
    """Call a function of the library: pointers as `pointer` and `integers` make them, plain numbers otherwise."""
    function = _functions.get(name + suffix) or _declared(name, suffix)
    function(*arguments)
    if (recorder := _thread.recorder) is not None:
        recorder.called(name, arguments, suffix)


def answer(name: str, *arguments: Any) -> int:
    """What a function of the library says."""
    return (_functions.get(name) or _declared(name, ""))(*arguments)


def _declared(name: str, suffix: str) -> Any:
    function = getattr(library(), f"fastres_{name}{suffix}")
    function.restype = ctypes.c_int64 if name in _ANSWERS else None
    function.argtypes = [_TYPES[letter] for letter in {**SIGNATURES, **_ANSWERS}[name]]
    _functions[name + suffix] = function
    return function


def with_slots(name: str, suffix: str) -> int:
    """Address of the form of a function that takes its arguments in slots, see slots.h."""
    address = ctypes.cast(getattr(library(), f"fastres_{name}{suffix}_slots"), ctypes.c_void_p).value
    assert address is not None
    return address
