"""On a GPU: of several implementations of each convolution the one that is the fastest for the call's shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastres.kernels.launch import is_ahead, spoil
from fastres.kernels.parts import joining
from fastres.kernels.types import Moments
from fastres.ops.backends.protocol import Activation, Backend, Convolution, Gradient, Normalised, Shortcut
from fastres.ops.backends.triton import Triton, TritonVendorWeights, Vendor, Way
from fastres.ops.graphs import is_one_graph
from fastres.ops.timing import TimedChoices

RANKS = 3  # tile configurations of a convolution that are timed, see `fastres.kernels.configs`


def gpu_candidates() -> list[Backend]:
    """What a convolution on a GPU chooses among, Triton with its first tiles first."""
    vendor = Vendor()
    tiles = (Triton(rank) for rank in range(1, RANKS))
    ways = (Triton(way=way) for way in Way if way is not Way.MODEL)
    return [Triton(), vendor, TritonVendorWeights(vendor), *tiles, *ways]


class Timed(Triton):
    """`Triton`, but each convolution goes to the candidate that was chosen for its shapes.

    Args:
        choices: times the candidates and remembers the winners.
        candidates: the preferred one first.

    Attributes:
        chosen: the name of the winner by the text of a call, for all calls so far.
    """

    def __init__(self, choices: TimedChoices, candidates: Sequence[Backend] | None = None):
        super().__init__()
        self.name = "timed"
        self.chosen: dict[str, str] = {}
        self._choices = choices
        self._candidates = {one.name: one for one in (gpu_candidates() if candidates is None else candidates)}
        self._calls: dict[tuple, Callable] = {}

    def conv(
        self, activation: Activation, conv: Convolution, residual: Tensor | None = None, moments: bool = True
    ) -> tuple[Tensor, Moments | None]:
        return self._fastest("conv", activation, conv, residual, moments)

    def bn_add_relu_conv(
        self, normalised: Normalised, shortcut: Shortcut | None, weight: Tensor, moments: bool = True
    ) -> tuple[Tensor, Tensor, Moments | None]:
        return self._fastest("bn_add_relu_conv", normalised, shortcut, weight, moments)

    def conv_backward(
        self,
        gradient: Gradient,
        activation: Activation,
        conv: Convolution,
        joined: Shortcut | None = None,
        end: Normalised | None = None,
        need_dx: bool = True,
        need_dw: bool = True,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self._fastest("conv_backward", gradient, activation, conv, joined, end, need_dx, need_dw)

    def conv_dgrad(self, gradient: Gradient, conv: Convolution, hw: tuple[int, int]) -> Tensor:
        return self._fastest("conv_dgrad", gradient, conv, hw)

    def conv_wgrad(self, gradient: Gradient, activation: Activation, conv: Convolution) -> Tensor:
        return self._fastest("conv_wgrad", gradient, activation, conv)

    def conv_bias_act(
        self, x: Tensor, conv: Convolution, bias: Tensor, residual: Tensor | None = None, relu: bool = True
    ) -> Tensor:
        return self._fastest("conv_bias_act", x, conv, bias, residual, relu)

    def _fastest(self, primitive: str, *arguments: Any) -> Any:
        key = primitive, _signature(arguments)
        call = self._calls.get((is_one_graph(), key))
        if call is None and is_ahead():
            return self._compile(primitive, key, arguments)
        if call is None:
            call = self._choose(primitive, key, arguments)
        return call(*arguments)

    def _compile(self, primitive: str, key: tuple, arguments: tuple) -> Any:
        """The undefined result of the chosen candidate, or of any; what all need that may be chosen is compiled."""
        calls = self._calls_of(primitive)
        known = self._choices.known(_text(key), calls)
        result = None
        for name, call in calls.items():
            if name == known or (known is None and not isinstance(self._candidates[name], Vendor)):
                with suppress(Exception):  # shows where it is timed
                    result = call(*arguments)
        return result

    def _calls_of(self, primitive: str) -> dict[str, Callable]:
        return {
            name: getattr(backend, primitive)
            for name, backend in self._candidates.items()
            if _differs_in(backend, primitive)
        }

    def _choose(self, primitive: str, key: tuple, arguments: tuple) -> Callable:
        text, calls = _text(key), self._calls_of(primitive)
        if torch.cuda.is_current_stream_capturing():  # a graph cannot hold the timing; an eager call may still decide
            return calls[self._choices.known(text, calls) or next(iter(calls))]
        spoil("its implementations are timed")
        with joining(False):  # each candidate's own work, all of it
            name = self._choices.choose(text, {name: partial(call, *arguments) for name, call in calls.items()})
        self._calls[is_one_graph(), key] = calls[name]
        self.chosen[text] = name
        return calls[name]


def _differs_in(backend: Backend, primitive: str) -> bool:
    """Whether a candidate is no plain Triton in a primitive: the ways differ in a convolution's joint gradients, and
    `Way.ONCE` forward too.
    """
    if primitive == "conv_backward":
        return True
    ways = (Way.MODEL, Way.ONCE) if primitive == "conv" else (Way.MODEL,)
    way = backend.way if isinstance(backend, Triton) else Way.MODEL
    return way in ways and not isinstance(backend, TritonVendorWeights)


def _signature(values: tuple) -> tuple:
    """What a choice depends on: shapes and dtypes of tensors, whether optional ones are there, plain numbers."""
    return tuple(
        (v.shape, v.dtype) if isinstance(v, Tensor) else _signature(v) if isinstance(v, tuple) else v for v in values
    )


def _text(key: tuple) -> str:
    def text(value: Any) -> str:
        if isinstance(value, torch.Size):
            return "x".join(map(str, value))
        if isinstance(value, tuple):
            return f"({', '.join(map(text, value))})"
        return str(value).removeprefix("torch.")

    primitive, arguments = key
    return f"{primitive}({', '.join(map(text, arguments))})"
