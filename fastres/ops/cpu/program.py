"""Walks over small tensors as programs: recorded once, then done in one call of C++ with one piece of memory.

Much of a small network's step is not arithmetic but what is between the calls: Python, checks, memory of a few
kilobytes. A walk's calls depend on nothing but its key, its inputs' shapes and dtypes, the tiles and the number of
threads. So the second walk of a kind is recorded, see `fastres.ops.cpu.tape`, and those that follow repeat its calls:
the same ones in the same order, so with the same bits. What no list of calls can do, PyTorch's convolutions or exchange
between ranks, stays a walk, and so does what needs much memory, whose calls are long.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastres.kernels import buffers
from fastres.ops.arena import Span, layout
from fastres.ops.cpu import tiles
from fastres.ops.cpu.native import call, integers, with_slots
from fastres.ops.cpu.tape import Place, Tape, apart
from fastres.ops.recent import Recent

# Programs and notes of walks that are kept; what one walk's memory beside its results may be.
MOST_PROGRAMS, MOST_BYTES = 256, 16 * 2**20
_ALIGNMENT = 64


class Unrecordable(Exception):
    """No program can be made of a walk; says why."""


class _Result(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype


class Program:
    """The calls of a walk.

    Args:
        tape: that recorded them.
        results, inputs: of that walk.

    Raises:
        Unrecordable: where the walk cannot be done again, a result is no memory of its own, or the walk's own memory is
            too large.
    """

    def __init__(self, tape: Tape, results: Sequence[Tensor], inputs: Sequence[Tensor | None]):
        if tape.reason:
            raise Unrecordable(tape.reason)
        self._results = [_Result(tuple(t.shape), t.dtype) for t in results]
        self._constants = tape.constants
        places = [_result_place(tape, result) for result in results]
        count = len(inputs)
        bases = {place.number: count + number for number, place in enumerate(places)}
        if len(bases) < len(places):
            raise Unrecordable("results share memory")
        self._arena, offsets = layout(_spans(tape, set(bases)), _ALIGNMENT)
        if self._arena > MOST_BYTES:
            raise Unrecordable(f"it takes {self._arena} bytes")
        arena, words = count + len(places), []
        for name, suffix, arguments in tape.calls:
            words += [with_slots(name, suffix), len(arguments)]
            for argument in arguments:
                if isinstance(argument, int):
                    words += [-1, argument]
                elif argument.is_input:
                    words += [argument.number, argument.offset]
                elif argument.number in bases:
                    words += [bases[argument.number], argument.offset]
                else:
                    words += [arena, offsets[argument.number] + argument.offset]
        self._words, self._bases = integers(words), ctypes.c_int64 * (arena + 1)

    def arena(self, like: Tensor) -> Tensor:
        """The memory that a run needs beside its results."""
        return buffers.empty(like, self._arena, dtype=torch.uint8)

    def run(
        self, inputs: Sequence[Tensor | None], results: list[Tensor] | None = None, arena: Tensor | None = None
    ) -> list[Tensor]:
        """The walk's results for other inputs of the same shapes and dtypes, contiguous and on the CPU.

        Args:
            results: where they go, contiguous and of the same shapes and dtypes; None: they are made.
            arena: at least as large as this program's; None: it is made.
        """
        like = next(t for t in inputs if t is not None)
        if results is None:
            results = [buffers.empty(like, *shape, dtype=dtype) for shape, dtype in self._results]
        tensors = [*inputs, *results, self.arena(like) if arena is None else arena]
        bases = self._bases(*[0 if t is None else t.data_ptr() for t in tensors])
        call("program", self._words, len(self._words), bases)
        return results


def _result_place(tape: Tape, result: Tensor) -> Place:
    place = tape.place(result)
    if place is None or place.is_input or tape.sizes[place.number] != result.nbytes or not result.is_contiguous():
        raise Unrecordable("a result is no memory of its own")
    return place


def _spans(tape: Tape, results: set[int]) -> dict[int, Span]:
    """When each piece of memory but the results is used, counted in calls."""
    spans: dict[int, Span] = {}
    for number, (_, _, arguments) in enumerate(tape.calls):
        for place in arguments:
            if isinstance(place, Place) and not place.is_input and place.number not in results:
                first = spans[place.number].first if place.number in spans else number
                spans[place.number] = Span(first, number, tape.sizes[place.number])
    return spans


class Programs:
    """The walks of late by key: how often they were seen, and their programs."""

    def __init__(self):
        self._known: Recent[Program | bool] = Recent()  # True: seen once; False: it stays a walk

    def repeated(
        self, key: Hashable, inputs: Sequence[Tensor | None], walk: Callable[[], list[Tensor]]
    ) -> list[Tensor]:
        """See `fastres.ops.backends.protocol.Backend.repeated`."""
        forms = [None if t is None else (t.shape, t.dtype) for t in inputs]
        whole = (key, tuple(forms), torch.get_num_threads(), tiles.form())
        known = self._known.get(whole)
        if known is None:
            self._known.keep(whole, True, MOST_PROGRAMS)
        if not known or not all(t is None or (t.is_contiguous() and t.is_cpu) for t in inputs):
            return walk()
        if known is not True:
            return known.run(inputs)
        return self._recorded(whole, inputs, walk) if apart(inputs) else walk()

    def _recorded(
        self, key: Hashable, inputs: Sequence[Tensor | None], walk: Callable[[], list[Tensor]]
    ) -> list[Tensor]:
        tape = Tape(inputs)
        with tape:
            results = walk()
        try:
            self._known.keep(key, Program(tape, results, inputs), MOST_PROGRAMS)
        except Unrecordable:
            self._known.keep(key, False, MOST_PROGRAMS)
        return results

    def clear(self) -> None:
        """Forget them all."""
        self._known.clear()
