"""Bytes that each Triton launch of a step loads and stores, counted in Triton's interpreter.

Which addresses a kernel touches does not depend on the values there, so the products themselves are left out, and equal
launches are interpreted once. One image is interpreted, with the tiles of the whole batch; the launchers then tell,
without running anything, how large every tensor of the same launches is at the batch in question. Of each argument the
same share is touched there: an activation, a weight or a coefficient is read whole whatever the batch, a strided 1x1
convolution reads every fourth pixel of all. Launches that only the larger batch needs, or makes in other
tiles, such as the merging of many partial sums, are small and interpreted at their true size.

Needs ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import copy
import inspect
import math
import sys
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor
from triton import knobs
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

import fastres.kernels  # noqa: F401  (loads the launchers)
from bench.workloads import IMAGE
from fastres.kernels import configs
from fastres.kernels.configs import Config
from fastres.kernels.geometry import cdiv
from fastres.ops import select


@dataclass
class Argument:
    """A tensor argument of a launch and what the launch did with it, in bytes."""

    size: int
    loaded: int = 0  # every address once: what device memory must deliver if the caches hold what is read again
    stored: int = 0  # every address once
    issued: int = 0  # all loads and stores, repeated ones too: what the second-level cache must deliver


@dataclass
class LaunchTraffic:
    """A launch and the tensors that it was given, by argument."""

    kernel: str
    arguments: dict[str, Argument]
    tile: dict[str, int]
    programs: int
    flops: int = 0  # of a convolution's products

    @property
    def loaded(self) -> int:
        """Bytes loaded, every address once."""
        return sum(argument.loaded for argument in self.arguments.values())

    @property
    def stored(self) -> int:
        """Bytes stored, every address once."""
        return sum(argument.stored for argument in self.arguments.values())

    @property
    def issued(self) -> int:
        """Bytes of all loads and stores."""
        return sum(argument.issued for argument in self.arguments.values())

    @property
    def least(self) -> int:
        """Bytes of all its tensors."""
        return sum(argument.size for argument in self.arguments.values())


def traffic(step: Callable[[int], Any], batch: int, sample: int = 1) -> list[LaunchTraffic]:
    """Traffic of the launches that ``step(batch)`` makes.

    Args:
        step: a training step of ``batch`` images; its launches depend on nothing but the batch.
        sample: the batch to interpret.

    Raises:
        RuntimeError: without ``TRITON_INTERPRET=1``, or where a launch at the batch has no like at the sample.
    """
    with configs.taken() as noted:
        asked = _by_kernel(_launches(step, batch))
    with _tiles_given([one for one in noted if isinstance(one, Config)]):
        samples = _launches(step, sample, everything=True)
    sampled = _by_kernel(samples)
    comparable = {kernel for kernel, kinds in asked.items() if kinds == sampled.get(kernel)}
    found = _launches(step, batch, kernels=asked.keys() - comparable)
    likes = (launch for launch in samples if launch.kernel in comparable)
    for launch, like in zip((launch for launch in found if launch.kernel in comparable), likes):
        _extrapolate(launch, like)
    return found


def _by_kernel(launches: list[LaunchTraffic]) -> dict[str, list[tuple]]:
    """Of each kernel's launches what an extrapolation needs to be the same: their tiles and the tensors they have."""
    found: dict[str, list[tuple]] = {}
    for launch in launches:
        found.setdefault(launch.kernel, []).append((launch.tile, [*launch.arguments]))
    return found


def unlaunched() -> AbstractContextManager[list[LaunchTraffic]]:
    """Fused operations on CPU tensors launch nothing inside: memory is not touched, results are undefined."""
    return _counting((), everything=False)


def _extrapolate(launch: LaunchTraffic, like: LaunchTraffic) -> None:
    """Fill in a launch that did not run from one that did.

    Loads that repeat go with the size of what is loaded, or, where that is the same in every batch, with the number of
    programs.
    """
    if (launch.kernel, launch.tile, [*launch.arguments]) != (like.kernel, like.tile, [*like.arguments]):
        raise RuntimeError(f"{launch.kernel} {launch.tile} has no like at the sample, but {like.kernel} {like.tile}")
    for name, argument in launch.arguments.items():
        sampled = like.arguments[name]
        growth = argument.size / sampled.size
        argument.loaded, argument.stored = round(sampled.loaded * growth), round(sampled.stored * growth)
        repeats = growth if growth != 1 else launch.programs / like.programs
        argument.issued = max(argument.loaded + argument.stored, round(sampled.issued * repeats))


@contextmanager
def _tiles_given(tiles: list[Config]) -> Iterator[None]:
    """Launchers take these configurations, in order: those of a large batch, whatever their own."""
    given = iter(tiles)
    with ExitStack() as patches:
        for name, module in list(sys.modules.items()):
            if name.startswith("fastres.kernels.") and module is not configs and hasattr(module, "at_rank"):
                patches.enter_context(mock.patch.object(module, "at_rank", lambda *_: next(given)))
        yield


def _launches(
    step: Callable[[int], Any], batch: int, kernels: Collection[str] = (), everything: bool = False
) -> list[LaunchTraffic]:
    """The launches of a step, of which those of ``kernels``, or all, are interpreted and counted; others do nothing."""
    with _counting(kernels, everything) as found:
        step(batch)
    return found


@dataclass
class _Memory:
    """The arguments of the running launch by address, and which of their elements it touched."""

    starts: list[int] = field(default_factory=list)
    arguments: list[Argument] = field(default_factory=list)
    touched: dict[tuple[int, str], np.ndarray] = field(default_factory=dict)

    def add(self, tensor: Tensor, argument: Argument) -> None:
        place = bisect_right(self.starts, tensor.data_ptr())
        self.starts.insert(place, tensor.data_ptr())
        self.arguments.insert(place, argument)

    def touch(self, kind: str, pointers: Any, mask: Any) -> None:
        addresses, inside = np.broadcast_arrays(pointers.data, mask.data)
        addresses = addresses[inside.astype(bool)]
        if not addresses.size:
            return
        width = pointers.get_element_ty().primitive_bitwidth // 8
        index = bisect_right(self.starts, int(addresses[0])) - 1
        argument = self.arguments[index]
        argument.issued += addresses.size * width
        elements = self.touched.setdefault((index, kind), np.zeros(argument.size // width, dtype=bool))
        elements[(addresses - self.starts[index]) // width] = True

    def settle(self) -> None:
        """Write the numbers of distinct bytes into the arguments."""
        for (index, kind), elements in self.touched.items():
            argument = self.arguments[index]
            setattr(argument, kind, int(elements.sum()) * (argument.size // elements.size))


WIDE = 2**20  # elements of a tile of a sum of parts that is interpreted: Triton takes no more


def _in_wide_tiles(
    grid: tuple[int, ...], bound: dict[str, Any], kwargs: dict[str, Any]
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Grid and options of a launch with a sum of parts (`fastres.kernels.parts`) whose tiles are wider.

    It touches the same addresses as often, in a hundredth of the interpreter's time.
    """
    others, wide = grid[0] - cdiv(bound["size"], bound["BLOCK"]), WIDE // bound["PARTS"]
    return (others + cdiv(bound["size"], wide),), {**kwargs, "BLOCK": wide}


def _in_wide_blocks(bound: dict[str, Any], kwargs: dict[str, Any]) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Grid and options of `fastres.kernels.stem.spread_kernel` with blocks of more squares, likewise."""
    squares = 4096
    return (cdiv(bound["size"], squares),), {**kwargs, "BLOCK": squares}


LONG = 1024  # pixels of a step that is interpreted


def _in_long_steps(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Options of a launch whose programs go through pixels step by step (`fastres.kernels.configs.steps_of`), with
    longer steps.

    Programs then have a few pixels more, and the last ones none: all together they touch the same addresses, in a tenth
    of the interpreter's time.
    """
    longer = max(1, LONG // kwargs["BLOCK_M"])
    return {**kwargs, "steps": cdiv(kwargs["steps"], longer), "BLOCK_M": longer * kwargs["BLOCK_M"]}


# What interpreted launches did, by all that it depends on.
_interpreted: dict[tuple, dict[str, Argument]] = {}


def _identity(value: Any, tensors: dict[str, Tensor]) -> Any:
    """What the traffic of a launch depends on: of a tensor its kind, and which of the arguments has the same memory."""
    if not isinstance(value, Tensor):
        return value
    same = next(name for name, tensor in tensors.items() if tensor.data_ptr() == value.data_ptr())
    return value.shape, value.stride(), value.dtype, same


def _flops(bound: dict[str, Any]) -> int:
    """Operations of the convolution that a launch with these arguments is a pass of, or two; 0 where it is none."""
    if "COUT" not in bound:
        return 0
    passes = 2 if "dx_ptr" in bound and "dw_ptr" in bound else 1
    pixels = bound["M"] if "M" in bound else bound["N"] * bound["OH"] * bound["OW"]
    taps = bound.get("KH", 1) * bound.get("KW", 1)
    return 2 * passes * pixels * bound.get("CIN", IMAGE) * bound["COUT"] * taps


@contextmanager
def _counting(kernels: Collection[str], everything: bool) -> Iterator[list[LaunchTraffic]]:
    if not knobs.runtime.interpret:
        raise RuntimeError("traffic is counted in Triton's interpreter: set TRITON_INTERPRET=1")
    found: list[LaunchTraffic] = []
    memory = _Memory()
    run, atomic = GridExecutor.__call__, InterpreterBuilder.create_atomic_rmw
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def launch(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        nonlocal memory
        memory = _Memory()
        own = {name: value for name, value in kwargs.items() if name in self.arg_names}
        bound = inspect.signature(self.fn).bind(*args, **own).arguments
        tensors = {name: value for name, value in bound.items() if isinstance(value, Tensor)}
        arguments = {name: Argument(tensor.nbytes) for name, tensor in tensors.items()}
        tile = {name: value for name, value in bound.items() if name.startswith("BLOCK")}
        grid = self.grid(bound) if callable(self.grid) else self.grid
        found.append(LaunchTraffic(self.fn.__name__, arguments, tile, math.prod(grid), _flops(bound)))
        if not everything and self.fn.__name__ not in kernels:
            return
        key = (self.fn, tuple(grid), *((name, _identity(value, tensors)) for name, value in bound.items()))
        if key in _interpreted:
            found[-1].arguments = copy.deepcopy(_interpreted[key])
            return
        for name, tensor in tensors.items():
            memory.add(tensor, arguments[name])
        if bound.get("parts_ptr") is not None:
            self.grid, kwargs = _in_wide_tiles(grid, bound, kwargs)
        if self.fn.__name__ == "spread_kernel":
            self.grid, kwargs = _in_wide_blocks(bound, kwargs)
        if "steps" in kwargs and "STAGES" in kwargs:
            kwargs = _in_long_steps(kwargs)
        run(self, *args, **kwargs)
        memory.settle()
        _interpreted[key] = copy.deepcopy(arguments)

    def counted_load(self: InterpreterBuilder, pointers: Any, mask: Any, *rest: Any) -> Any:
        memory.touch("loaded", pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self: InterpreterBuilder, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        memory.touch("stored", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def counted_atomic(self: InterpreterBuilder, op: Any, pointer: Any, value: Any, mask: Any, *rest: Any) -> Any:
        memory.touch("loaded", pointer, mask)
        memory.touch("stored", pointer, mask)
        return atomic(self, op, pointer, value, mask, *rest)

    def no_product(self: InterpreterBuilder, a: Any, b: Any, accumulator: Any, *_: Any) -> Any:
        return accumulator

    with (
        mock.patch.object(GridExecutor, "__call__", launch),
        mock.patch.multiple(
            InterpreterBuilder,
            create_masked_load=counted_load,
            create_masked_store=counted_store,
            create_atomic_rmw=counted_atomic,
            create_dot=no_product,
        ),
        select.implementation("triton"),
    ):
        yield found
