"""The loop of a kernel, as its machine code has it."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from typing import NamedTuple

from bench.machine.assembly import Instruction
from bench.machine.pipes import GLOBAL, TENSOR, moved


class Loop(NamedTuple):
    """Indices of a loop's first instruction and of the branch back."""

    first: int
    last: int


def main_loop(code: Sequence[Instruction]) -> Loop | None:
    """The smallest loop around tensor-core instructions, or, where there are none, the longest; None without loops."""
    found = [Loop(one.target, index) for index, one in enumerate(code) if one.target is not None and one.target < index]
    products = [loop for loop in found if any(one.name in TENSOR for one in body(code, loop))]
    if products:
        return min(products, key=lambda loop: loop.last - loop.first)
    return max(found, key=lambda loop: loop.last - loop.first, default=None)


def body(code: Sequence[Instruction], loop: Loop) -> Sequence[Instruction]:
    """A loop's instructions."""
    return code[loop.first : loop.last + 1]


def copies(code: Sequence[Instruction], trips: int) -> float:
    """Asynchronous copies of a warp that move what ``trips`` trips of the main loop need: those in front of the loop
    are the first trips', so that the last trips' have nothing left to copy. No limit where the loop has none."""
    loop = main_loop(code)
    a_trip = sum(one.name == "LDGSTS" and not one.never for one in body(code, loop)) if loop else 0
    return trips * a_trip or math.inf


def issued_bytes(code: Sequence[Instruction], trips: int, names: Set[str] = frozenset(GLOBAL)) -> int:
    """Bytes that a warp loads from and stores to global memory, by its instructions of these names."""
    first, last = main_loop(code) or (0, -1)
    ahead = copies(code, 1) < math.inf  # copies in front of the loop are some of its trips'

    def times(index: int, one: Instruction) -> int:
        if first <= index <= last:
            return trips
        return 0 if ahead and index < first and one.name == "LDGSTS" else 1

    return sum(moved(one) * times(index, one) for index, one in enumerate(code) if one.name in names)


def jumps(code: Sequence[Instruction]) -> list[int | None]:
    """Where each instruction goes if not to the next one, with forward branches alone.

    Those without a predicate are taken, those with one only where the main loop could not be reached otherwise: a
    compiler may put the code for no trips at all in front of the loop, and a jump over the loop behind that code.
    """
    first, last = main_loop(code) or (0, -1)
    reaches = [first <= index <= last for index in range(len(code) + 1)]
    found: list[int | None] = [None] * len(code)
    for index in reversed(range(len(code))):
        one, target = code[index], code[index].target
        if one.name == "BRA" and target is not None and target > index:
            enters = index < first and reaches[target] and not reaches[index + 1]
            found[index] = target if enters or _always(one) else None
        if index < first:
            following = found[index] or index + 1
            reaches[index] = reaches[following] and not (one.name == "EXIT" and not one.guard)
    return found


def _always(one: Instruction) -> bool:
    return not one.guard and "UP" not in one.operands
