"""Where in one piece of memory several are put that are not all needed at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Span(NamedTuple):
    """``size`` bytes that are needed from step ``first`` to step ``last``."""

    first: int
    last: int
    size: int


def layout(spans: Mapping[int, Span], alignment: int) -> tuple[int, dict[int, int]]:
    """Bytes for all, and where in them each begins: the largest first, in the first gap that is free meanwhile."""
    placed: list[tuple[int, Span]] = []
    offsets: dict[int, int] = {}
    total = 0
    for name, span in sorted(spans.items(), key=lambda item: -item[1].size):
        begin = 0
        for other, taken in sorted(placed, key=lambda item: item[0]):
            if taken.first > span.last or span.first > taken.last:
                continue
            if begin + span.size <= other:
                break
            begin = max(begin, -(-(other + taken.size) // alignment) * alignment)
        placed.append((begin, span))
        offsets[name] = begin
        total = max(total, begin + span.size)
    return total, offsets
