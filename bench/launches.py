"""What a GPU would be asked to run: launches of Triton kernels recorded instead of made, on a machine without a GPU.

The launchers of ``fastres.kernels`` run on CPU tensors whose memory nobody touches, and ``JITFunction.run`` is replaced
by a recorder. It specialises and packs the arguments with Triton's own functions, so what is recorded is what the JIT
would compile: None and constexpr arguments, integers that equal 1, and pointers and integers that 16 divides are told
apart as in a real run, and what is compiled from it has the JIT's own key in Triton's cache.

The process must not have ``TRITON_INTERPRET`` set when it imports the kernels.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from triton import knobs
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, compile, get_cache_key, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from fastres.ops import implementation
from fastres.ops.backends import vendor
from fastres.ops.backends.timed import RANKS
from fastres.ops.backends.triton import Triton, Vendor, Way

# Behind the ranks of the tiles: the other ways in which a convolution's gradients share what both read.
WAYS = dict(enumerate((way for way in Way if way is not Way.MODEL), RANKS))
# What a launch asks of the compiler beside the kernel's own arguments.
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "launch_pdl")


@dataclass(frozen=True)
class Specialisation:
    """A kernel and all that its compilation depends on but the architecture; hashable, can be pickled."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]  # argument to its type, "constexpr" where the value is compiled in
    constexprs: tuple[tuple[tuple[int, ...], Any], ...]  # by the argument's position
    attributes: tuple[tuple[tuple[int, ...], str], ...]  # as Triton packs them: "D" where 16 divides the argument
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

    def cache_key(self, target: GPUTarget) -> str:
        """Where Triton's cache has it, compiled for the target."""
        return cache_key(self.source(), target, dict(self.options))

    def compile(self, target: GPUTarget) -> CompiledKernel:
        """Compiled for the target, or found in Triton's cache."""
        return compile(self.source(), target=target, options=dict(self.options))


def cache_key(source: ASTSource, target: GPUTarget, options: dict[str, Any]) -> str:
    """Name of the folder in Triton's cache that `triton.compile` writes with these arguments."""
    backend = make_backend(target)
    key = get_cache_key(source, backend, backend.parse_options(dict(options)), get_cache_invalidating_env_vars())
    return base64.b32encode(hashlib.sha256(key.encode()).digest()).decode().rstrip("=")


@dataclass(frozen=True)
class Launch:
    """A recorded launch."""

    specialisation: Specialisation
    grid: tuple[int, ...]
    integers: dict[str, int] = field(
        default_factory=dict, hash=False
    )  # arguments by name, those that are compiled in too
    tensors: dict[str, tuple[int, int]] = field(default_factory=dict, hash=False)  # by name: address, bytes
    rank: int | None = 0  # of the configuration, or one of `WAYS`; None: around the library's convolutions

    @property
    def programs(self) -> int:
        """Programs in the grid."""
        return math.prod(self.grid)


@contextmanager
def recorded(rank: int | None = 0) -> Iterator[list[Launch]]:
    """Fused operations on CPU tensors take the Triton launchers; their launches are listed, their results undefined.

    Args:
        rank: which configuration the launchers that offer several take, the first at 0; one of `WAYS`; None:
            convolutions are the library's, which are not run, between Triton's passes.

    Raises:
        RuntimeError: under ``TRITON_INTERPRET``.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: interpreted kernels are neither specialised nor compiled")
    backend = Vendor() if rank is None else Triton(way=WAYS[rank]) if rank in WAYS else Triton(rank)
    launches: list[Launch] = []

    def run(function: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        specialisation, bound = _specialise(function, args, kwargs)
        size = grid(bound) if callable(grid) else grid
        integers = {name: int(value) for name, value in bound.items() if isinstance(value, int)}
        tensors = {name: (one.data_ptr(), one.nbytes) for name, one in bound.items() if isinstance(one, Tensor)}
        launches.append(Launch(specialisation, tuple(size), integers, tensors, rank))

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.multiple(vendor, **_UNRUN),
        implementation(backend),
    ):
        yield launches


def _unrun(function: Callable) -> Callable:
    """A function of the same arguments and shapes, results undefined."""

    def call(*args: Any) -> Any:
        shapes = function(*tree_map_only(Tensor, lambda tensor: tensor.to("meta"), args))
        return tree_map_only(Tensor, lambda tensor: torch.empty_like(tensor, device="cpu"), shapes)

    return call


# What `VendorConvolutions` computes beside its passes.
_UNRUN: dict[str, Any] = {
    "convolve": _unrun(vendor.convolve),
    "convolve_backward": _unrun(vendor.convolve_backward),
    "add_gradient": lambda dx, joined: None,
}


def _specialise(function: JITFunction, args: tuple, kwargs: dict[str, Any]) -> tuple[Specialisation, dict[str, Any]]:
    bound, kinds, options = _binder(function)(*args, **kwargs)
    # Releases of Triton pack different attributes of constexprs, and all of them are in the cache's key.
    _, signature, constexprs, attributes = function._pack_args(_Unparsed(), kwargs, bound, kinds, options)
    specialisation = Specialisation(
        function.fn.__module__,
        function.fn.__name__,
        tuple(signature.items()),
        tuple(constexprs.items()),
        tuple(attributes.items()),
        tuple((name, kwargs[name]) for name in OPTIONS if kwargs.get(name) is not None),
    )
    return specialisation, bound


class _Unparsed:
    """Triton's backend for `JITFunction._pack_args`, but attributes stay the strings that they are parsed from."""

    parse_attr = staticmethod(str)

    def parse_options(self, options: dict[str, Any]) -> Any:
        return _backend().parse_options(dict(options))


@cache
def _backend():
    return make_backend(GPUTarget("cuda", 90, 32))  # specialises alike for every CUDA architecture


@cache
def _binder(function: JITFunction) -> Callable:
    return create_function_from_signature(function.signature, function.params, _backend())
