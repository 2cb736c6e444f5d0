"""Learning-rate schedules as a factor of the peak, a pure function of the step: nothing to save or restore."""

from __future__ import annotations

import math

from fastres.errors import FastresError

TRIANGLE_START = 0.2  # the triangular schedule starts here and not at 0: the first steps count in a short run


def parse_milestones(text: str) -> tuple[float, ...]:
    """The shares of the run in ``"0.5,0.75"``.

    Raises:
        FastresError: for anything but growing numbers between 0 and 1.
    """
    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError:
        shares = ()
    if not shares or not all(low < high for low, high in zip((0.0, *shares), (*shares, 1.0))):
        raise FastresError(f"--milestones {text!r} must be growing shares of the run between 0 and 1, such as 0.5,0.75")
    return shares


def lr_factor(
    schedule: str,
    step: int,
    total_steps: int,
    warmup: float,
    milestones: tuple[float, ...] = (0.5, 0.75),
    decay_factor: float = 0.1,
) -> float:
    """Factor in [0, 1] of the peak learning rate for optimizer step ``step`` (from 0) of ``total_steps``.

    Args:
        schedule: ``constant``; ``cosine`` (Loshchilov & Hutter 2017); ``step`` (a multiplication by ``decay_factor``
            at each of ``milestones``, shares of the run; by default as in He et al. 2015: a tenth at 32k and 48k of
            64k steps); ``triangular`` (linear up to the peak, then down to 0; Smith 2018).
        warmup: share of the run with a linear rise to the peak. ``constant`` has none.
    """
    if schedule == "constant":
        return 1.0
    progress = step / total_steps
    if progress < warmup:
        start = TRIANGLE_START if schedule == "triangular" else 0.0
        # (step + 1): a first step at rate 0 would be wasted
        return start + (1 - start) * min(1.0, (step + 1) / (warmup * total_steps))
    if schedule == "step":
        return decay_factor ** sum(progress >= milestone for milestone in milestones)
    rest = (progress - warmup) / max(1 - warmup, 1 / total_steps)
    return 1 - rest if schedule == "triangular" else 0.5 * (1 + math.cos(math.pi * rest))
