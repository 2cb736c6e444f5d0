"""Speed and memory of training steps: `fastres bench` and the scripts of ``bench/`` measure through these."""

from fastres.measure.step import Step, Workload
from fastres.measure.timing import Timing, all_of, interleaved, synchronize
from fastres.measure.variants import VARIANTS, Variant, supported

__all__ = [
    "VARIANTS",
    "Variant",
    "Step",
    "Timing",
    "Workload",
    "all_of",
    "interleaved",
    "supported",
    "synchronize",
]
