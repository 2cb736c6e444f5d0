"""Learning-rate schedules as a factor of the peak, a pure function of the step: nothing to save or restore."""

from __future__ import annotations

import math

TRIANGLE_START = 0.2  # the triangular schedule starts here and not at 0: the first steps count in a short run
STEP_MILESTONES = (0.5, 0.75)  # He et al. 2015 divide the rate by 10 at 32k and 48k of 64k steps


def lr_factor(schedule: str, step: int, total_steps: int, warmup: float) -> float:
    """Factor in [0, 1] of the peak learning rate for optimizer step ``step`` (from 0) of ``total_steps``.

    Args:
        schedule: ``constant``; ``cosine`` (Loshchilov & Hutter 2017); ``step`` (He et al. 2015, a tenth at one
            half and at three quarters); ``triangular`` (linear up to the peak, then down to 0; Smith 2018).
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
        return 0.1 ** sum(progress >= milestone for milestone in STEP_MILESTONES)
    rest = (progress - warmup) / max(1 - warmup, 1 / total_steps)
    return 1 - rest if schedule == "triangular" else 0.5 * (1 + math.cos(math.pi * rest))
