"""The loop of a kernel, as its machine code has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from bench.machine.assembly import Instruction
from bench.machine.pipes import TENSOR


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
