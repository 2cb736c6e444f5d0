"""Bytes that each Triton launch of a step loads and stores, counted in Triton's interpreter.

Which addresses a kernel touches does not depend on the values there, so the products themselves are left out. An
interpreted batch is small; the launchers then tell, without running anything, how large every tensor of the same
launches is at the batch in question. Of each argument the same share is touched there: an activation, a weight or a
coefficient is read whole whatever the batch, a strided 1x1 convolution reads every fourth pixel of all. Launches that
only the larger batch needs, such as the merging of many partial sums, are small and interpreted at their true size.

Needs ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import inspect
import sys
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import fastres.kernels  # noqa: F401  (loads the launchers)
import numpy as np
from fastres.kernels import configs
from fastres.kernels.configs import Config
from torch import Tensor
from triton import knobs
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

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


def traffic(step: Callable[[int], Any], batch: int, samples: tuple[int, int] = (1, 2)) -> list[LaunchTraffic]:
    """Traffic of the launches that ``step(batch)`` makes.

    Args:
        step: a training step of ``batch`` images; its launches depend on nothing but the batch.
        samples: batches to interpret.

    Raises:
        RuntimeError: without ``TRITON_INTERPRET=1``, or where a launch at the batch has no like at the samples.
    """
    with _tiles_noted() as tiles:
        counts = Counter(launch.kernel for launch in _launches(step, batch))
    with _tiles_given(tiles):
        small = _launches(step, samples[0], everything=True)
    with _tiles_given(tiles):
        larger = _launches(step, samples[1], everything=True)
    sampled = [Counter(launch.kernel for launch in launches) for launches in (small, larger)]
    comparable = {kernel for kernel, count in counts.items() if all(count == other[kernel] for other in sampled)}
    found = _launches(step, batch, kernels=counts.keys() - comparable)
    samples_of = defaultdict(list)
    for pair in zip(*([launch for launch in one if launch.kernel in comparable] for one in (small, larger))):
        samples_of[pair[0].kernel].append(pair)
    for launch in found:
        if launch.kernel in comparable:
            _extrapolate(launch, *samples_of[launch.kernel].pop(0), samples, batch)
    return found


def unlaunched() -> AbstractContextManager[list[LaunchTraffic]]:
    """Fused operations on CPU tensors launch nothing inside: memory is not touched, results are undefined."""
    return _counting((), everything=False)


def _extrapolate(
    launch: LaunchTraffic, small: LaunchTraffic, larger: LaunchTraffic, samples: tuple[int, int], batch: int
) -> None:
    """Fill in a launch that did not run: shares of a tensor are constant, repeated loads linear in the batch."""
    if launch.tile != larger.tile or launch.arguments.keys() != larger.arguments.keys():
        raise RuntimeError(f"{launch.kernel} is not the same launch at batch {batch} as at {samples[1]}")
    for name, argument in launch.arguments.items():
        one, two = small.arguments[name], larger.arguments[name]
        argument.loaded = round(two.loaded / two.size * argument.size)
        argument.stored = round(two.stored / two.size * argument.size)
        slope = (two.issued - one.issued) / (samples[1] - samples[0])
        argument.issued = max(
            argument.loaded + argument.stored, round(two.issued + slope * (batch - samples[1]))
        )


@contextmanager
def _tiles_noted() -> Iterator[list[Config]]:
    """The configurations that launchers take, in order."""
    noted: list[Config] = []

    def at_rank(found: list[Config], rank: int) -> Config:
        noted.append(configs.at_rank(found, rank))
        return noted[-1]

    with _chosen_by(at_rank):
        yield noted


def _tiles_given(tiles: list[Config]) -> AbstractContextManager[None]:
    """Launchers take these configurations, in order: those of a large batch, whatever their own."""
    given = iter(tiles)
    return _chosen_by(lambda found, rank: next(given))


@contextmanager
def _chosen_by(at_rank: Callable[[list[Config], int], Config]) -> Iterator[None]:
    with ExitStack() as patches:
        for name in ("conv", "dgrad", "wgrad"):
            patches.enter_context(mock.patch.object(sys.modules[f"fastres.kernels.{name}"], "at_rank", at_rank))
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
        addresses = addresses[inside]
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
        for name, tensor in tensors.items():
            memory.add(tensor, arguments[name])
        tile = {name: value for name, value in bound.items() if name.startswith("BLOCK")}
        found.append(LaunchTraffic(self.fn.__name__, arguments, tile))
        if everything or self.fn.__name__ in kernels:
            run(self, *args, **kwargs)
            memory.settle()

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
