"""The one rule for how many pixels a side images have: in training, evaluation, prediction and export."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

LARGE = 224  # photos larger than this are taken at this size unless another one is asked for
LEAST = 8


@dataclass(frozen=True)
class Sides:
    """The shorter sides of a set's images, in pixels: the least, the median and the largest."""

    least: int
    median: int
    largest: int

    @classmethod
    def of(cls, sides: Sequence[int]) -> Sides:
        """Of the images' shorter sides."""
        return cls(min(sides), int(statistics.median_low(sides)), max(sides))

    def __str__(self) -> str:
        if self.least == self.largest:
            return f"{self.least} pixels"
        return f"{self.least} to {self.largest} pixels, {self.median} in the median"


def seen_side(sides: Sides, asked: int | None) -> int:
    """Pixels a side that the network sees: those asked for, else the median shorter side, but no more than `LARGE`."""
    return asked if asked is not None else min(LARGE, max(LEAST, sides.median))


def stored_side(sides: Sides, seen: int, share: float = 1.0) -> int:
    """Pixels a side that images are decoded to: ``seen``, or what the largest has in this ``share`` of it where that is
    less.

    Decoding enlarges nothing that all images lack; the rest of the way is `Augment.resize`'s, on the device.
    """
    return min(seen, max(1, round(share * sides.largest)))
