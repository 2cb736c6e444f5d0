"""Launches that are made again, without a GPU: interpreted kernels in the place of compiled ones, and of the driver."""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest import mock

import torch
from support_kernels import INTERPRETED
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime.interpreter import InterpretedFunction

from fastres.kernels.dependent import is_programmatic
from fastres.ops.backends import launches, replay

_C_TYPES = {"i32": ctypes.c_int32, "fp32": ctypes.c_float, "*": ctypes.c_uint64}


class Interpreted:
    """What Triton's interpreter would have compiled: takes addresses where the kernel was launched with tensors."""

    packed_metadata = None
    by_function: dict[int, Interpreted] = {}

    def __init__(self, launched, kernel: InterpretedFunction, arguments: dict):
        self.launched, self.kernel = launched, kernel
        self.dtypes = {name: value.dtype for name, value in arguments.items() if isinstance(value, Tensor)}
        self.options = {name: value for name, value in arguments.items() if name not in kernel.arg_names}
        self.constants = {name: value for name, value in arguments.items() if self._type(name, value) == "constexpr"}
        signature = {name: self._type(name, arguments[name]) for name in kernel.arg_names}
        self.src = SimpleNamespace(signature=signature)
        target = SimpleNamespace(backend="cuda", warp_size=32)
        sizes = dict(num_warps=self.options.get("num_warps", 4), num_ctas=1, shared=1024)
        self.metadata = SimpleNamespace(name=kernel.__name__, target=target, launch_pdl=is_programmatic(), **sizes)
        self.function = 4096 + len(self.by_function)
        self.by_function[self.function] = self

    def _type(self, name: str, value) -> str:
        """As Triton names it: constants and ones are compiled in."""
        annotation = (
            inspect.signature(self.kernel.fn).parameters[name].annotation if name in self.kernel.arg_names else ""
        )
        if isinstance(value, Tensor):
            return "*"
        if "constexpr" in str(annotation) or value is None or (type(value) is int and value == 1):
            return "constexpr"
        return "fp32" if isinstance(value, float) else "i32"

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments) -> None:
        named = dict(zip(self.kernel.arg_names, arguments, strict=True))
        for name, dtype in self.dtypes.items():
            named[name] = torch.frombuffer((ctypes.c_char * 8).from_address(named[name]), dtype=dtype, count=1)
        self.launched(self.kernel, grid=(x, y, z), warmup=False, **named, **self.options)

    def launch(self, grid: tuple[int, int, int], threads: int, parameters) -> None:
        """As the driver does: every argument behind a pointer of its own, scratch memory's last."""
        values, place = dict(self.constants), 0
        for name, kind in self.src.signature.items():
            if kind != "constexpr":
                values[name] = _C_TYPES[kind].from_address(parameters[place]).value
                place += 1
        assert [ctypes.c_uint64.from_address(parameters[place + i]).value for i in (0, 1)] == [0, 0]
        assert threads == 32 * self.metadata.num_warps
        self.run(*grid, 0, self.function, None, None, None, None, *[values[name] for name in self.kernel.arg_names])


@contextmanager
def on_stand_in() -> Iterator[None]:
    """Interpreted kernels leave behind what a GPU's launch does, and CPU tensors count as a GPU's."""
    if not INTERPRETED:
        yield
        return
    launched = InterpretedFunction.run

    def run(kernel, *args, grid, warmup, **options):
        with _disable_current_modes():  # the interpreter's own operations
            launched(kernel, *args, grid=grid, warmup=warmup, **options)
        return Interpreted(launched, kernel, dict(zip(kernel.arg_names, args)) | options)

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(InterpretedFunction, "run", run))
        patches.enter_context(mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False))
        for name, stand_in in dict(
            _is_plain=lambda inputs: True, _stream=lambda device: 0, _settings=lambda: (), _compile=lambda walk: None
        ).items():
            patches.enter_context(mock.patch.object(replay, name, stand_in))
        yield


class Attribute(ctypes.Structure):
    """cuda.h's CUlaunchAttribute, of which one value is read."""

    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60)]


class Config(ctypes.Structure):
    """cuda.h's CUlaunchConfig."""

    _fields_ = [
        *((f"{part}_{axis}", ctypes.c_uint) for part in ("grid", "block") for axis in "xyz"),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(Attribute)),
        ("count", ctypes.c_uint),
    ]


class Driver:
    """Functions with the CUDA driver's interface that interpret the kernels, and count what they are asked for.

    Attributes:
        launches: grid, bytes of shared memory and stream of each. contexts: calls in the order of their making.
        dependent: of each launch, whether it may begin before the kernel before has ended.
        error: what the next launch returns. context: what is current, 0: none.
    """

    def __init__(self) -> None:
        self.launches: list[tuple[tuple[int, int, int], int, int]] = []
        self.dependent: list[bool] = []
        self.contexts: list[str] = []
        self.error, self.context = 0, 1
        c, pointer = ctypes.CFUNCTYPE, ctypes.c_void_p
        self._kept = [
            c(ctypes.c_int, pointer, *[ctypes.c_uint] * 7, pointer, ctypes.POINTER(pointer), pointer)(self._launch),
            c(ctypes.c_int, ctypes.POINTER(Config), pointer, ctypes.POINTER(pointer), pointer)(self._launch_with),
            c(ctypes.c_int, ctypes.POINTER(pointer))(self._current),
            c(ctypes.c_int, ctypes.POINTER(ctypes.c_int), ctypes.c_int)(self._device),
            c(ctypes.c_int, ctypes.POINTER(pointer), ctypes.c_int)(self._retain),
            c(ctypes.c_int, pointer)(self._make_current),
        ]
        addresses = [ctypes.cast(one, pointer).value for one in self._kept]
        self.functions = (pointer * len(addresses))(*addresses)

    def _launch_with(self, config, function, parameters, extra) -> int:
        one = config[0]
        assert (one.count, one.attributes[0].id, one.attributes[0].value) == (1, 6, 1)  # programmatic serialisation
        sizes = one.grid_x, one.grid_y, one.grid_z, one.block_x, one.block_y, one.block_z
        return self._launch(function, *sizes, one.shared, one.stream, parameters, extra, dependent=True)

    def _launch(
        self, function, x, y, z, threads, ty, tz, shared, stream, parameters, extra, dependent: bool = False
    ) -> int:
        if self.error:
            return self.error
        self.dependent.append(dependent)
        assert (ty, tz, extra) == (1, 1, None)
        self.launches.append(((x, y, z), shared, stream or 0))
        try:
            Interpreted.by_function[function].launch((x, y, z), threads, parameters)
        except BaseException as error:  # nothing passes through C++
            self.raised = error
            return 999
        return 0

    def _current(self, context) -> int:
        context[0] = self.context
        return 0

    def _device(self, device, ordinal) -> int:
        self.contexts.append(f"device {ordinal}")
        device[0] = 7
        return 0

    def _retain(self, context, device) -> int:
        self.contexts.append(f"retain {device}")
        context[0] = 5
        return 0

    def _make_current(self, context) -> int:
        self.contexts.append(f"current {context}")
        self.context = context
        return 0


@contextmanager
def driver_stand_in() -> Iterator[Driver]:
    """`fastres.ops.backends.launches` takes a `Driver` for the CUDA driver."""
    made = Driver()
    with mock.patch.object(launches, "driver", lambda: made.functions):
        yield made
