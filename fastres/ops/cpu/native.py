"""Calls of the compiled passes: here, and nowhere else, a tensor becomes an address."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastres.ops.cpu.build import library

# What each function takes, in C++: p a pointer, i int64, d double, b bool.
_SIGNATURES = {
    "finalize": "pppppdiip",
    "backward_coef": "ppiidbppp",
    "moments": "pppiiippi",
    "normalise": "ppppbpiiii",
    "backward_sums": "pppppppppppiiii",
    "backward_apply": "pppppiiii",
    "max_pool": "pppppi",
    "max_pool_backward": "ppppi",
    "patches": "ppppi",
    "weight_grad": "ipppppppi",
    "unit_pixels": "ipbp",
    "pack": "ipbppi",
    "conv": "ipppppppppppi",
    "folded_conv": "ipppppbpi",
    "data_grad": "ippppppppppppi",
}
# What returns an int64.
_ANSWERS = {"form": "", "units": "ipb", "packed_size": "ipb"}
_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "d": ctypes.c_double, "b": ctypes.c_bool}
_functions: dict[str, Any] = {}


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
        return address
    raise RuntimeError(
        f"a compiled pass takes a contiguous {dtype} tensor of at least {size} elements on the CPU, but got a "
        f"{type(tensor).__name__} of {tensor.dtype}, shape {list(tensor.shape)}, on {tensor.device}, "
        f"strides {list(tensor.stride())}: run it with fastres.ops.implementation('aten')"
    )


def integers(values: Sequence[int]) -> ctypes.Array:
    """int64 values where a function takes a pointer to them."""
    return (ctypes.c_int64 * len(values))(*values)


def call(name: str, *arguments: Any, suffix: str = "") -> None:
    """Call a function of the library: pointers as `pointer` and `integers` make them, plain numbers otherwise."""
    function = _functions.get(name + suffix) or _declared(name, suffix)
    function(*arguments)


def answer(name: str, *arguments: Any) -> int:
    """What a function of the library says."""
    return (_functions.get(name) or _declared(name, ""))(*arguments)


def _declared(name: str, suffix: str) -> Any:
    function = getattr(library(), f"fastres_{name}{suffix}")
    function.restype = ctypes.c_int64 if name in _ANSWERS else None
    function.argtypes = [_TYPES[letter] for letter in {**_SIGNATURES, **_ANSWERS}[name]]
    _functions[name + suffix] = function
    return function
