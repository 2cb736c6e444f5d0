"""Progressive resolution: a run starts on smaller images, whose steps are cheaper (Howard 2018, "DAWNBench")."""

from __future__ import annotations

from fastres.errors import FastresError

LEAST = 8  # pixels: less is no image


def parse_progressive(text: str) -> tuple[tuple[int, float], ...]:
    """The (pixels a side, share of the run until which) pairs in ``"16:0.3,24:0.7"``.

    Raises:
        FastresError: for text of another form, a size below `LEAST`, or shares that do not grow between 0 and 1.
    """
    try:
        pairs = [part.split(":") for part in text.split(",")]
        stages = tuple((int(size), float(share)) for size, share in pairs)
    except ValueError:
        stages = ()
    shares = [share for _, share in stages]
    if not stages or not all(low < high for low, high in zip([0.0, *shares], [*shares, 1.0])):
        raise FastresError(
            f"--progressive {text!r} must be SIZE:SHARE pairs with shares of the run that grow between 0 and 1, "
            "such as 16:0.3,24:0.7"
        )
    if small := [size for size, _ in stages if size < LEAST]:
        raise FastresError(f"--progressive {text!r}: {small[0]} pixels are too few, the least is {LEAST}")
    return stages


def size_at(stages: tuple[tuple[int, float], ...], step: int, total_steps: int) -> int | None:
    """Pixels a side of the images of a step (from 0) of ``total_steps``; None: their own size."""
    return next((size for size, share in stages if step < share * total_steps), None)
