"""The launches of a step that a GPU timed, each with what the model predicts of it."""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

from triton.runtime.jit import KernelInterface

from bench.launches import Launch
from bench.machine.chips import LAUNCH, Chip
from bench.machine.fused import Compiler, Timed, timed
from bench.machine.networks import SHARED_BY_ALL, step_of
from bench.machine.pipes import WARP
from bench.machine.program import Program
from fastres import kernels as library
from fastres.measure import Workload


class Measured(NamedTuple):
    """A row of `bench.trace.in_order`."""

    kernel: str
    microseconds: float
    grid: Sequence[int]
    block: Sequence[int]
    registers: int
    shared: int


class Pair(NamedTuple):
    """A launch as the GPU and as the model have it."""

    measured: Measured
    timed: Timed
    program: Program

    @property
    def same_code(self) -> bool:
        """Whether threads, registers and shared memory are those of the program that is predicted."""
        ran, program = self.measured, self.program
        needs = WARP * program.warps, program.registers, program.shared
        return (math.prod(ran.block), ran.registers, ran.shared) == needs

    def seconds(self, chip: Chip) -> dict[str, float]:
        """Measured, predicted without the gap to the next launch, and what binds it alone."""
        work = self.timed.work
        alone = {"bytes": work.bytes / chip.bandwidth, "tensor": work.operations / chip.peak}
        model = self.timed.seconds - LAUNCH
        return {"measured": self.measured.microseconds / 1e6, "model": model, **alone, "least": max(alone.values())}


def pairs(rows: Sequence[Sequence[Any]], workload: Workload, programs: Compiler, chip: Chip) -> list[Pair]:
    """Launches of a trace's rows and of the workload's recorded step.

    Raises:
        ValueError: see `check`.
    """
    measured, recorded = ours(rows), step_of(workload, arch=programs.arch)
    check(measured, recorded)
    return [
        Pair(one, predicted, programs(predicted.launch.specialisation))
        for one, predicted in zip(measured, timed(recorded, programs, chip))
    ]


def ours(rows: Sequence[Sequence[Any]]) -> list[Measured]:
    """The project's kernels of a trace, without those that `bench.machine` leaves out."""
    names = _library_kernels()
    return [Measured(*row) for row in rows if row[0] in names and not row[0].startswith(SHARED_BY_ALL)]


def _library_kernels() -> set[str]:
    files = [
        importlib.import_module(f"{library.__name__}.{one.name}") for one in pkgutil.iter_modules(library.__path__)
    ]
    return {name for file in files for name, one in vars(file).items() if isinstance(one, KernelInterface)}


def check(measured: Sequence[Measured], recorded: Sequence[Launch]) -> None:
    """That both are the same launches.

    Raises:
        ValueError: names the first that is not.
    """
    counts = f"of {len(measured)} and {len(recorded)} launches"
    for place, (one, launch) in enumerate(zip_longest(measured, recorded), 1):
        ran = _named(one.kernel, one.grid) if one else "nothing more"
        known = _named(launch.specialisation.kernel, launch.grid) if launch else "nothing more"
        if ran != known:
            raise ValueError(
                f"launch {place}: the GPU ran {ran}, recorded here is {known}, {counts}: "
                "take the commit and the workload that were measured"
            )


def _named(kernel: str, grid: Sequence[int]) -> str:
    return f"{kernel} of {'x'.join(map(str, [*grid, 1, 1][:3]))} programs"
