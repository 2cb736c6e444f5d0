"""CUDA without a GPU: tensors that have a device, a shape and no values, and a recorder in every place that a GPU would
act.

Inside `fake_cuda` tensors are PyTorch's fake ones, so an operation on tensors of two devices raises and so does a
question for a value, which on a GPU would be a wait. Triton launches are checked and listed instead of made,
``torch.cuda`` tells of two H100s, and autograd's engine, which needs a device, is a Python one. What is not seen: any
value.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._library.custom_ops import CustomOpDef
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

import fastres.ops
from fastres.kernels import resources
from fastres.kernels.types import Moments
from fastres.ops import select

MOST_PROGRAMS = (2**31 - 1, 65535, 65535)  # of a launch's grid (CUDA C++ Programming Guide, compute capabilities)
OPTIONS = {"num_warps", "num_stages", "maxnreg"}


@dataclass(frozen=True)
class Launch:
    """A Triton kernel that would have run."""

    kernel: str
    device: int
    grid: tuple[int, ...]
    arguments: dict[str, Any]


@dataclass
class FakeCuda:
    """What happened on the fake devices, and their state."""

    pick: int = 0  # which candidate wins each timed choice, counted around
    current: int = 0
    capturing: bool = False
    stream: int = 0
    launches: list[Launch] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)  # of the host, for the device
    copies: list[str] = field(default_factory=list)  # from memory of the host that is not pinned
    choices: dict[str, list[str]] = field(default_factory=dict)  # candidates of each timed choice
    disagreements: list[str] = field(default_factory=list)  # of their results' shapes and dtypes
    captures: int = 0
    replays: int = 0
    streams: int = 0

    def kernels(self) -> set[str]:
        """Names of those launched."""
        return {launch.kernel for launch in self.launches}

    def devices(self) -> set[int]:
        """Those launched on."""
        return {launch.device for launch in self.launches}


@contextmanager
def fake_cuda(pick: int = 0, shared_memory: int = 232448, capability: tuple[int, int] = (9, 0)) -> Iterator[FakeCuda]:
    """Run what is inside on fake CUDA devices 0 and 1.

    Args:
        pick: which candidate wins each timed choice.
        shared_memory: bytes a program can have.
        capability: of the devices, major and minor.
    """
    cuda = FakeCuda(pick)
    caches = select._timed, resources._limit, resources._capability
    properties = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", major=capability[0], minor=capability[1], multi_processor_count=132,
        total_memory=80 * 2**30, shared_memory_per_block_optin=shared_memory,
    )  # fmt: skip
    with ExitStack() as stack:
        for cache in caches:
            cache.cache_clear()
            stack.callback(cache.cache_clear)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        for patch in (
            *_launch_patches(cuda),
            *_device_patches(cuda, properties),
            *_stream_patches(cuda),
            *_tensor_patches(cuda),
            *_autograd_patches(),
            mock.patch.object(select, "TimedChoices", lambda *_, host: EveryCandidate(cuda, host)),
        ):
            stack.enter_context(patch)
        stack.enter_context(fastres.ops.implementation("auto"))
        stack.enter_context(_Transfers(cuda))
        yield cuda


# -- launches --


def _launch_patches(cuda: FakeCuda) -> list[Any]:
    def run(function: Any, *args: Any, grid: Any, warmup: bool, **given: Any) -> None:
        if not warmup:
            cuda.launches.append(checked_launch(function.fn, args, grid, given, cuda.current))

    return [mock.patch.object(kind, "run", run) for kind in (JITFunction, InterpretedFunction)]


def checked_launch(kernel: Callable, args: tuple, grid: Any, given: dict[str, Any], device: int) -> Launch:
    """The launch, if Triton and CUDA would take it.

    Raises:
        AssertionError: for an argument too few or too many, a tensor that is elsewhere or not contiguous, or a grid
            that CUDA does not have.
    """
    name = kernel.__name__
    options = {option for option in given if option in OPTIONS}
    bound = inspect.signature(kernel).bind(*args, **{n: v for n, v in given.items() if n not in options}).arguments
    for argument, value in bound.items():
        if isinstance(value, Tensor):
            assert value.device == torch.device("cuda", device), (
                f"{name}: {argument} is on {value.device}, not {device}"
            )
            assert value.is_contiguous(), f"{name}: {argument} has strides {value.stride()} of {tuple(value.shape)}"
        assert argument.endswith("_ptr") == isinstance(value, Tensor) or value is None, (
            f"{name}: {argument} is {value!r}"
        )
        if argument.startswith("BLOCK"):
            assert value & (value - 1) == 0, f"{name}: {argument} is {value}, no power of 2"
    size = tuple(grid(bound) if callable(grid) else grid)
    assert all(isinstance(n, int) and 0 < n <= most for n, most in zip(size, MOST_PROGRAMS, strict=False)), (name, size)
    return Launch(name, device, size, bound)


# -- the devices --


def _device_patches(cuda: FakeCuda, properties: Any) -> list[Any]:
    @contextmanager
    def device(which: Any) -> Iterator[None]:
        before, cuda.current = cuda.current, _index(which, cuda)
        try:
            yield
        finally:
            cuda.current = before

    def set_device(which: Any) -> None:
        cuda.current = _index(which, cuda)

    replaced = dict(
        device=device,
        set_device=set_device,
        current_device=lambda: cuda.current,
        device_count=lambda: 2,
        is_available=lambda: True,
        is_initialized=lambda: False,
        get_device_capability=lambda which=None: (properties.major, properties.minor),
        get_device_name=lambda which=None: properties.name,
        get_device_properties=lambda which=None: properties,
        max_memory_allocated=lambda which=None: 0,
        mem_get_info=lambda which=None: (properties.total_memory // 2, properties.total_memory),
        empty_cache=lambda: None,
        synchronize=lambda which=None: cuda.waits.append("synchronize"),
        is_current_stream_capturing=lambda: cuda.capturing,
    )
    return [
        *(mock.patch.object(torch.cuda, name, value) for name, value in replaced.items()),
        mock.patch.object(fake_tensor, "init_gpu_context", lambda *_: None),
    ]


def _index(which: Any, cuda: FakeCuda) -> int:
    index = which if isinstance(which, int) else torch.device(which).index
    return cuda.current if index is None else index


def _stream_patches(cuda: FakeCuda) -> list[Any]:
    """Streams are numbers; a graph is what was captured, and counts."""

    class Stream:
        def __init__(self, device: Any = None, number: int | None = None):
            cuda.streams += number is None
            self.number, self.device = cuda.streams if number is None else number, _index(device or "cuda", cuda)

        def wait_stream(self, other: Stream) -> None:
            assert self.device == other.device == cuda.current

        def synchronize(self) -> None:
            cuda.waits.append("stream")

    class Event:
        def __init__(self, **_: Any):
            pass

        def record(self, *_: Any) -> None:
            pass

        def synchronize(self) -> None:
            cuda.waits.append("event")

    class CUDAGraph:
        device = None

        def replay(self) -> None:
            assert self.device == cuda.current and not cuda.capturing
            cuda.replays += 1

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        assert stream.device == cuda.current
        before, cuda.stream = cuda.stream, stream.number
        try:
            yield
        finally:
            cuda.stream = before

    @contextmanager
    def graph(recorded: CUDAGraph, pool: Any = None, stream: Stream | None = None) -> Iterator[None]:
        assert stream is not None and stream.device == cuda.current, "PyTorch's own stream may be of another device"
        recorded.device = cuda.current
        cuda.captures += 1
        with on(stream):
            cuda.capturing = True
            try:
                yield
            finally:
                cuda.capturing = False

    replaced = dict(
        Stream=Stream, Event=Event, CUDAGraph=CUDAGraph, stream=on, graph=graph,
        current_stream=lambda which=None: Stream(which, cuda.stream),
    )  # fmt: skip
    return [mock.patch.object(torch.cuda, name, value) for name, value in replaced.items()]


# -- timed choices --


class EveryCandidate:
    """Stands for `TimedChoices`: runs every candidate, compares what they made, and takes the one that is asked for."""

    def __init__(self, cuda: FakeCuda, host: Callable[[Callable[[], Any]], float]):
        self._cuda, self._host = cuda, host

    def choose(self, key: str, candidates: dict[str, Callable[[], Any]]) -> str:
        """The name of the candidate whose turn it is."""
        assert not self._cuda.capturing, "timed inside a graph"
        made = {name: described(call()) for name, call in candidates.items()}
        assert all(self._host(call) > 0 for call in candidates.values())
        first, *others = made
        for name in others:
            if made[name] != made[first]:
                self._cuda.disagreements.append(f"{key}: {name} makes {made[name]}, {first} {made[first]}")
        self._cuda.choices[key] = list(candidates)
        return list(candidates)[self._cuda.pick % len(candidates)]


def described(value: Any) -> Any:
    """Shape, dtype, device and layout of all tensors in a nest; without the number of tiles, which tiles decide."""
    if isinstance(value, Moments):
        return "moments", [(part.shape[1:], part.dtype, part.device, part.is_contiguous()) for part in value]
    if isinstance(value, Tensor):
        partial = value.dtype == torch.float32 and value.dim() == 3 and value.shape[1] == 2
        shape = value.shape[1:] if partial else value.shape
        return shape, value.dtype, value.device, value.is_contiguous()
    return tuple(map(described, value)) if isinstance(value, tuple) else value


# -- tensors --


class _Transfers(TorchDispatchMode):
    """Lists copies between host and device that make the host wait: all to the host, and those of memory not pinned."""

    def __init__(self, cuda: FakeCuda):
        super().__init__()
        self._cuda = cuda

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name == "_to_copy" and kwargs.get("device") is not None:
            self._copied(args[0], torch.device(kwargs["device"]))
        elif name == "copy_":
            self._copied(args[1], args[0].device)
        elif name in ("_local_scalar_dense", "nonzero", "masked_select", "equal") and args[0].device.type == "cuda":
            self._cuda.waits.append(name)
        return func(*args, **kwargs)

    def _copied(self, source: Tensor, to: torch.device) -> None:
        if source.device.type == "cuda" and to.type == "cpu":
            self._cuda.waits.append(f"copy of {tuple(source.shape)} to the host")
        if source.device.type == "cpu" and to.type == "cuda" and not getattr(source, "is_fake_pinned", False):
            self._cuda.copies.append(f"{tuple(source.shape)} {source.dtype}")


def _tensor_patches(cuda: FakeCuda) -> list[Any]:
    def pin_memory(tensor: Tensor) -> Tensor:
        pinned = tensor.clone()
        pinned.is_fake_pinned = True
        return pinned

    def new_tensor(data: Any, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
        values = np.asarray(data)
        kind = {"f": torch.float32, "b": torch.bool}.get(values.dtype.kind, torch.int64)
        if device is not None and torch.device(device).type == "cuda":
            cuda.copies.append(f"tensor of {values.shape}")
        return torch.empty(values.shape, dtype=dtype or kind, device=device)

    return [
        mock.patch.object(Tensor, "pin_memory", pin_memory),
        mock.patch.object(torch, "tensor", new_tensor),
        mock.patch.object(nn.Module, "to", moved),
    ]


def moved(module: nn.Module, *args: Any, **options: Any) -> nn.Module:
    """``module.to(...)`` in place with new, fake parameters and buffers; shared ones stay shared."""
    device, dtype, _, layout = torch._C._nn._parse_to(*args, **options)
    made: dict[int, Tensor] = {}
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    table[name] = made.setdefault(id(tensor), _like(tensor, device, dtype, layout))
    return module


def _like(tensor: Tensor, device: Any, dtype: Any, layout: Any) -> Tensor:
    new = torch.empty(
        tensor.shape,
        device=device or tensor.device,
        dtype=dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype,
    )
    if layout is not None and tensor.dim() == 4:
        new = new.contiguous(memory_format=layout)
    return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


# -- autograd --


def _autograd_patches() -> list[Any]:
    """Operations as plain functions, which need no dispatcher of the device, and an engine in Python."""
    engine = _Engine()
    patches = [mock.patch.object(Tensor, "backward", lambda tensor, gradient=None: engine.run(tensor, gradient))]
    for module in _operation_modules():
        for name, value in vars(module).items():
            if isinstance(value, CustomOpDef):
                patches.append(mock.patch.object(module, name, value._init_fn))
            elif (
                isinstance(value, type)
                and issubclass(value, torch.autograd.Function)
                and value.__module__ == module.__name__
            ):
                patches.append(mock.patch.object(value, "apply", engine.noting(value.apply)))
    return patches


def _operation_modules() -> list[ModuleType]:
    found = pkgutil.walk_packages(fastres.ops.__path__, "fastres.ops.")
    return [importlib.import_module(info.name) for info in found]


class _Engine:
    """Backward through a graph in the order of its edges, as autograd's own engine has it; no hooks, no streams."""

    def __init__(self):
        self._functions: dict[Any, tuple[list[bool], int]] = {}  # which arguments are tensors, and how many results

    def noting(self, apply: Callable) -> Callable:
        """``apply`` of an autograd Function, whose node cannot tell the engine its numbers of arguments and results."""

        def noted(*args: Any) -> Any:
            out = apply(*args)
            results = out if isinstance(out, tuple) else (out,)
            nodes = {result.grad_fn for result in results if isinstance(result, Tensor) and result.grad_fn is not None}
            for node in nodes:
                self._functions[node] = [isinstance(argument, Tensor) for argument in args], len(results)
            return out

        return noted

    def run(self, root: Tensor, gradient: Tensor | None) -> None:
        """Accumulate into ``grad`` of the leaves."""
        waiting = self._edges_into(root.grad_fn)
        given = {root.grad_fn: {root.output_nr: torch.ones_like(root) if gradient is None else gradient}}
        ready = [root.grad_fn]
        with torch.no_grad():
            while ready:
                node = ready.pop()
                gradients = self._call(node, given.pop(node, {}))
                for (behind, number), value in zip(node.next_functions, gradients):
                    if behind is None:
                        continue
                    if value is not None:
                        slots = given.setdefault(behind, {})
                        slots[number] = slots[number] + value if number in slots else value
                    waiting[behind] -= 1
                    if not waiting[behind]:
                        ready.append(behind)

    @staticmethod
    def _edges_into(root: Any) -> dict[Any, int]:
        count: dict[Any, int] = {root: 0}
        stack = [root]
        while stack:
            for behind, _ in stack.pop().next_functions:
                if behind is not None:
                    if behind not in count:
                        count[behind] = 0
                        stack.append(behind)
                    count[behind] += 1
        return count

    def _call(self, node: Any, given: dict[int, Tensor]) -> tuple:
        if type(node).__name__ == "AccumulateGrad":
            if 0 in given:
                _accumulate(node.variable, given[0])
            return ()
        if node in self._functions:
            tensors, results = self._functions.pop(node)
            found = node.apply(*(given.get(i) for i in range(results)))
            found = found if isinstance(found, tuple) else (found,)
            assert len(found) == len(tensors), f"{node} returns {len(found)} gradients for {len(tensors)} arguments"
            return tuple(value for value, is_tensor in zip(found, tensors) if is_tensor)
        found = node(*(given.get(i) for i in range(max(given, default=0) + 1)))
        return found if isinstance(found, tuple) else (found,)


def _accumulate(leaf: Tensor, gradient: Tensor) -> None:
    if gradient.shape != leaf.shape:
        gradient = gradient.sum_to_size(leaf.shape)  # as the engine does for what was broadcast
    assert (gradient.shape, gradient.dtype, gradient.device) == (leaf.shape, leaf.dtype, leaf.device), (
        f"gradient {tuple(gradient.shape)} {gradient.dtype} on {gradient.device} of {leaf.shape} {leaf.dtype} on "
        f"{leaf.device}"
    )
    if gradient.stride() != leaf.stride():  # autograd keeps gradients in their leaves' layout
        gradient = torch.empty_like(leaf).copy_(gradient)
    leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
