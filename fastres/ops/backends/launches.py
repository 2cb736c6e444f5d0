"""Launches of compiled kernels made again, with other addresses: by the CUDA driver, or by Triton's launcher.

Triton's launcher takes its arguments as Python's, one kernel at a time. Where all of a walk's kernels are as kernels
mostly are, C++ (`driver.cpp`) hands the driver as many of them as follow one another in one call.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from fastres.ops.cpu.build import Sources, load

ENVIRONMENT = "FASTRES_LAUNCHER"  # driver or triton
SOURCES = Sources("launches", "the launcher of kernels", (Path(__file__).with_name("driver.cpp"),), (), ())
# The driver's functions in the order of driver.cpp's struct.
FUNCTIONS = (
    "cuLaunchKernel",
    "cuLaunchKernelEx",
    "cuCtxGetCurrent",
    "cuDeviceGet",
    "cuDevicePrimaryCtxRetain",
    "cuCtxSetCurrent",
)
# How arguments other than pointers are packed, by Triton's name of their type; what it passes in 16 bits is not used.
_FORMATS = {"i1": "<i", "i8": "<b", "i16": "<h", "i32": "<i", "i64": "<q"}
_FORMATS |= {"u1": "<I", "u8": "<B", "u16": "<H", "u32": "<I", "u64": "<Q"}
_FORMATS |= {"fp32": "<f", "f32": "<f", "fp64": "<d"}
Addresses = ctypes.Array  # of ctypes.c_uint64
_MOST_SHARED = 228 * 1024  # bytes of shared memory above which Triton asks for a special mode


class Place(NamedTuple):
    """Where an argument lies: ``offset`` bytes behind the begin of a piece of memory, or of an input."""

    number: int  # inputs come first
    offset: int


class Launch(NamedTuple):
    """A kernel's launch: pointers among the arguments are None here, and `Place` in ``pointers``."""

    compiled: Any  # by Triton; None in its interpreter
    grid: tuple[int, int, int]
    arguments: list[Any]
    pointers: list[tuple[int, Place]]


class Launcher(Protocol):
    """Makes the launches of a walk, see `launcher`."""

    def __call__(self, begin: int, end: int, bases: Addresses, stream: int, device: int) -> None:
        """Make those from ``begin`` on, before ``end``.

        Args:
            bases: addresses by the number that a `Place` has.
            stream: the driver's handle. device: its number.

        Raises:
            RuntimeError: what the driver says.
        """


def launcher(launches: Sequence[Launch]) -> Launcher:
    """Who makes these launches: the driver where it can, unless ``FASTRES_LAUNCHER=triton``."""
    if launches and is_wanted() and (functions := driver()) is not None and (call := _call()) is not None:
        if all(_is_common(one) for one in launches):
            return ByDriver(launches, functions, call)
    return ByTriton(launches)


def is_wanted() -> bool:
    """Whether the driver is to be called directly.

    Raises:
        ValueError: where ``FASTRES_LAUNCHER`` is neither of its values.
    """
    value = os.environ.get(ENVIRONMENT, "driver")
    if value not in ("driver", "triton"):
        raise ValueError(f"{ENVIRONMENT}={value}: choose driver or triton")
    return value == "driver"


class ByTriton:
    """One after the other, by what Triton made to launch them."""

    def __init__(self, launches: Sequence[Launch]):
        self._launches = [
            (one.compiled.run, one.compiled.function, one.compiled.packed_metadata, one.grid, *one[2:])
            for one in launches
        ]

    def __call__(self, begin: int, end: int, bases: Addresses, stream: int, device: int) -> None:
        """See `Launcher`."""
        for run, function, metadata, grid, fixed, pointers in self._launches[begin:end]:
            arguments = fixed.copy()
            for index, (number, offset) in pointers:
                arguments[index] = bases[number] + offset
            run(*grid, stream, function, metadata, None, None, None, *arguments)


class _Launch(ctypes.Structure):
    """driver.cpp's."""

    _fields_ = [
        ("function", ctypes.c_void_p),
        ("grid", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32),
        ("shared_bytes", ctypes.c_uint32),
        ("dependent", ctypes.c_uint32),
        ("first", ctypes.c_uint32),
        ("last", ctypes.c_uint32),
    ]


class _Parameter(ctypes.Structure):
    """driver.cpp's."""

    _fields_ = [("base", ctypes.c_int64), ("value", ctypes.c_uint64)]


class ByDriver:
    """In one call, without Python between them.

    Args:
        functions: the driver's, see `driver`. call: driver.cpp's ``fastres_launch``.
    """

    def __init__(self, launches: Sequence[Launch], functions: ctypes.Array, call: Any):
        self._compiled = [one.compiled for one in launches]  # a kernel that nobody holds is unloaded
        made: list[_Launch] = []
        parameters: list[_Parameter] = []
        for one in launches:
            first = len(parameters)
            parameters += [_Parameter(*pair) for pair in packed(one)]
            metadata = one.compiled.metadata
            threads = metadata.num_warps * metadata.target.warp_size
            grid, dependent = (ctypes.c_uint32 * 3)(*one.grid), getattr(metadata, "launch_pdl", False)
            made.append(
                _Launch(one.compiled.function, grid, threads, metadata.shared, dependent, first, len(parameters))
            )
        self._launches = (_Launch * len(made))(*made)
        self._parameters = (_Parameter * len(parameters))(*parameters)
        self._functions, self._call = functions, call

    def __call__(self, begin: int, end: int, bases: Addresses, stream: int, device: int) -> None:
        """See `Launcher`."""
        place = ctypes.c_int64()
        error = self._call(
            self._functions, self._launches, self._parameters, bases, stream, device, begin, end, ctypes.byref(place)
        )
        if error:
            name = self._compiled[place.value].metadata.name
            raise RuntimeError(f"kernel {name}: CUDA error {error}: {_text_of(error)}")


def packed(launch: Launch) -> Iterator[tuple[int, int]]:
    """What a kernel is given, in its order, each as number of a base, or -1, and an offset or the value's bits.

    What is compiled in is not given, and two pointers to scratch memory end it.
    """
    places = dict(launch.pointers)
    for index, (kind, value) in enumerate(zip(_signature(launch), launch.arguments, strict=True)):
        if kind == "constexpr":
            continue
        if index in places:
            yield places[index]
        elif kind[0] == "*":
            yield -1, 0 if value is None else value
        else:
            yield -1, int.from_bytes(struct.pack(_FORMATS[kind], value), "little")
    yield -1, 0
    yield -1, 0


def _signature(launch: Launch) -> list[str]:
    """Triton's name of each argument's type."""
    return list(launch.compiled.src.signature.values())


def _is_common(launch: Launch) -> bool:
    """Whether a kernel is launched with nothing but its arguments: no clusters, no scratch memory, no special mode."""
    if launch.compiled is None:
        return False
    metadata, signature = launch.compiled.metadata, _signature(launch)
    special = ("launch_cooperative_grid", "global_scratch_size", "profile_scratch_size")
    return (
        metadata.target.backend == "cuda"
        and metadata.num_ctas == 1
        and metadata.shared <= _MOST_SHARED
        and not any(getattr(metadata, name, None) for name in (*special, "instrumentation_mode"))
        and all(kind == "constexpr" or kind[0] == "*" or kind in _FORMATS for kind in signature)
        and len(signature) + 2 <= _most_parameters()
    )


@cache
def driver() -> ctypes.Array | None:
    """Addresses of the CUDA driver's functions; None where it is not there."""
    if torch.version.cuda is None:
        return None
    try:
        library = ctypes.CDLL("libcuda.so.1")
        addresses = [ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in FUNCTIONS]
    except (OSError, AttributeError):
        return None
    return (ctypes.c_void_p * len(addresses))(*addresses)


def _text_of(error: int) -> str:
    """What the driver says of an error."""
    text = ctypes.c_char_p()
    try:
        ctypes.CDLL("libcuda.so.1").cuGetErrorString(error, ctypes.byref(text))
    except (OSError, AttributeError):
        pass
    return (text.value or b"see CUresult in the driver's documentation").decode()


@cache
def _library() -> ctypes.CDLL | None:
    loaded = load(SOURCES)
    return loaded if isinstance(loaded, ctypes.CDLL) else None


@cache
def _call() -> Any:
    """driver.cpp's function; None where there is no compiler."""
    library = _library()
    if library is None:
        return None
    function, i64, pointer = library.fastres_launch, ctypes.c_int64, ctypes.c_void_p
    function.argtypes = [pointer, pointer, pointer, pointer, pointer, i64, i64, i64, pointer]
    function.restype = i64
    return function


def _most_parameters() -> int:
    library = _library()
    return 0 if library is None else library.fastres_most_parameters()
