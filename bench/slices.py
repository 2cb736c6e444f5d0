"""The campaign cut into commands of at most eight minutes, in order of worth: ``bench/campaign.sh --slice N``."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

STAGES = (
    "environment", "tests", "precompile", "autotune", "parts", "models", "memory", "step", "accuracy",
)  # fmt: skip
FIRST = ("resnet*", "notebook*")  # networks: all but the deepest


@dataclass(frozen=True)
class Part:
    """Cases of a stage.

    Args:
        stage: of `STAGES`.
        cases: patterns of their names, as a shell's.
    """

    stage: str
    cases: tuple[str, ...] = ("*",)

    def has(self, case: str) -> bool:
        """Whether a case belongs to it."""
        return any(fnmatchcase(case, pattern) for pattern in self.cases)


@dataclass(frozen=True)
class Slice:
    """What one command measures."""

    what: str
    parts: tuple[Part, ...]


def _first(*groups: str) -> tuple[str, ...]:
    """Cases of stage `models`: groups of variants, of the first networks."""
    return tuple(f"{network} | {group}" for network in FIRST for group in groups)


SLICES = {
    1: Slice("ceilings, and the tests that need a GPU", (Part("environment"), Part("tests", ("gpu",)))),
    2: Slice("kernels compiled by all cores, implementations chosen by time", (Part("precompile"), Part("autotune"))),
    3: Slice(
        "operations, then five networks as fused, fused Triton, library, eager and compile",
        (Part("parts", ("operations*",)), Part("models", _first("fused", "compile"))),
    ),
    4: Slice("time to accuracy, and CUDA graphs", (Part("accuracy"), Part("models", _first("fused graph")))),
    5: Slice("profiler's traces, and peak memory", (Part("step"), Part("memory"))),
    6: Slice(
        "the rest: other variants, batches, blocks, the other tests", (Part("models"), Part("parts"), Part("tests"))
    ),
}
