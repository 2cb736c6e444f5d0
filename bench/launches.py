"""What a GPU would be asked to run: launches of Triton kernels recorded instead of made, on a machine without a GPU.

The launchers of ``fastres.kernels`` run on CPU tensors whose memory nobody touches, and ``JITFunction.run`` is replaced
by a recorder. It specialises the arguments with Triton's own binder, so what is recorded is what the JIT would compile:
None and constexpr arguments, integers that equal 1, and pointers and integers that 16 divides are told apart as in a
real run.

The process must not have ``TRITON_INTERPRET`` set when it imports the kernels.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from fastres.ops import select

# What a launch asks of the compiler beside the kernel's own arguments.
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")


@dataclass(frozen=True)
class Specialisation:
    """A kernel and all that its compilation depends on but the architecture; hashable, can be pickled."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]  # argument to its type, "constexpr" where the value is compiled in
    constexprs: tuple[tuple[tuple[int, ...], Any], ...]  # by the argument's position
    attributes: tuple[tuple[tuple[int, ...], str], ...]  # "D" where 16 divides the argument
    options: tuple[tuple[str, int], ...]

    @property
    def function(self) -> JITFunction:
        """The kernel."""
        return getattr(importlib.import_module(self.module), self.kernel)

    @property
    def constants(self) -> dict[str, Any]:
        """Values of the arguments that are compiled in, by name."""
        names = [name for name, _ in self.signature]
        return {names[path[0]]: value for path, value in self.constexprs}

    @property
    def pointers(self) -> dict[str, str]:
        """Element types of the tensor arguments, by name."""
        return {name: kind[1:] for name, kind in self.signature if kind.startswith("*")}

    def source(self) -> ASTSource:
        """What `triton.compile` takes."""
        backend = _backend()
        attributes = {path: backend.parse_attr(value) for path, value in self.attributes}
        return ASTSource(self.function, dict(self.signature), dict(self.constexprs), attributes)


@dataclass(frozen=True)
class Launch:
    """A recorded launch."""

    specialisation: Specialisation
    grid: tuple[int, ...]


@contextmanager
def recorded(rank: int = 0) -> Iterator[list[Launch]]:
    """Fused operations on CPU tensors take the Triton launchers; their launches are listed, their results undefined.

    Args:
        rank: which configuration the launchers that offer several take, the first at 0.

    Raises:
        RuntimeError: under ``TRITON_INTERPRET``.
    """
    primitives = triton_primitives(rank)
    launches: list[Launch] = []

    def run(function: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        specialisation, bound = _specialise(function, args, kwargs)
        size = grid(bound) if callable(grid) else grid
        launches.append(Launch(specialisation, tuple(size)))

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(select, "_primitives", lambda name: select.Primitives({name: primitives})),
        select.implementation("auto"),
    ):
        yield launches


def triton_primitives(rank: int = 0) -> SimpleNamespace:
    """The Triton primitives at one rank of their configurations.

    Raises:
        RuntimeError: under ``TRITON_INTERPRET``.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: interpreted kernels are neither specialised nor compiled")
    primitives = dict(vars(select._triton()))
    for name, launcher in primitives.items():
        if inspect.isfunction(launcher) and "rank" in inspect.signature(launcher).parameters:
            primitives[name] = partial(launcher, rank=rank)
    joint = partial(select._dgrad_and_wgrad, primitives["conv_dgrad"], primitives["conv_wgrad"])
    return SimpleNamespace(**{**primitives, "conv_backward": joint})


def _specialise(function: JITFunction, args: tuple, kwargs: dict[str, Any]) -> tuple[Specialisation, dict[str, Any]]:
    bound, kinds, _ = _binder(function)(*args, **kwargs)
    names, values = [param.name for param in function.params], list(bound.values())
    specialisation = Specialisation(
        function.fn.__module__,
        function.fn.__name__,
        tuple((name, kind) for name, (kind, _) in zip(names, kinds)),
        tuple(((i,), values[i]) for i, (kind, _) in enumerate(kinds) if kind == "constexpr"),
        tuple(((i,), hint) for i, (kind, hint) in enumerate(kinds) if kind != "constexpr" and isinstance(hint, str)),
        tuple((name, kwargs[name]) for name in OPTIONS if kwargs.get(name) is not None),
    )
    return specialisation, bound


@cache
def _backend():
    return make_backend(GPUTarget("cuda", 90, 32))  # specialises alike for every CUDA architecture


@cache
def _binder(function: JITFunction) -> Callable:
    return create_function_from_signature(function.signature, function.params, _backend())
