"""The predicted time of a launch."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from bench.machine import assembly, banks, loops, multiprocessor, pipes
from bench.machine.chips import LAUNCH, Chip
from bench.machine.loops import issued_bytes
from bench.machine.multiprocessor import Multiprocessor, Run
from bench.machine.occupancy import residents
from bench.machine.pipes import GLOBAL, unmodelled
from bench.machine.program import Program, cached
from bench.machine.work import Work
from fastres.atomic import atomic_write

# Simulated trips of a long loop: what the further ones take is their difference. Programs of a multiprocessor that are
# simulated one by one; of more the further ones take what they do in the steady state.
SHORT, LONG = 6, 10
MOST_PROGRAMS = 4


class Prediction(NamedTuple):
    """Of one launch."""

    seconds: float
    cycles: float  # of the fullest multiprocessor
    resident: int  # programs at once
    busy: dict[str, float]  # share of the time, by pipe and memory
    share: float  # of the tensor cores' peak or of the memory's bandwidth, whichever the launch needs longer


def launch_seconds(program: Program, work: Work, chip: Chip) -> Prediction:
    """Predict a launch: what the fullest multiprocessor takes, or the bytes, and the gap to the next launch.

    Raises:
        ValueError: for code that is not modelled, and for a program that does not fit.
    """
    each = math.ceil(work.programs / chip.sms)
    resident = min(residents(program.registers, program.shared, program.warps, chip), each)
    count = each if each <= MOST_PROGRAMS else max(2 * resident + 1, MOST_PROGRAMS - 1)

    def total(run: Run) -> float:
        if count == each:
            return run.ends[-1]
        # The last programs of a full GPU end at different times: half a life more than the steady state's share.
        steady = (run.ends[-1] - run.ends[resident - 1]) / (len(run.ends) - resident)
        return steady * work.programs / chip.sms + sum(run.lives) / len(run.lives) / 2

    active = min(chip.sms, work.programs)
    cycles, busy = _extrapolated(program, work, chip, resident, count, active, total)
    least = max(work.bytes / chip.bandwidth, work.operations / chip.peak)
    seconds = max(cycles / chip.clock, work.bytes / chip.bandwidth) + LAUNCH
    return Prediction(seconds, cycles, resident, busy, least / seconds)


def steady_share(program: Program, work: Work, chip: Chip) -> Prediction:
    """Predict a program on a full GPU, without a launch's begin and end: seconds and cycles are a program's share."""
    resident = residents(program.registers, program.shared, program.warps, chip)

    def total(run: Run) -> float:
        return (run.ends[-1] - run.ends[resident - 1]) / (len(run.ends) - resident)

    cycles, busy = _extrapolated(program, work, chip, resident, max(2 * resident + 1, 3), chip.sms, total)
    memory = work.bytes / work.programs / chip.memory
    cycles = max(cycles, memory)
    least = max(memory, work.operations / work.programs / chip.tensor)
    return Prediction(cycles / chip.clock / chip.sms, cycles, resident, busy, least / cycles)


def _extrapolated(program: Program, work: Work, chip: Chip, resident: int, count: int, active: int,
                  total: Callable[[Run], float]) -> tuple[float, dict[str, float]]:  # fmt: skip
    far = min(1.0, work.bytes / work.programs / max(beyond_l1(program, work), 1.0))
    memory = chip.bandwidth / chip.clock / active

    def at(trips: int) -> Run:
        return _simulated(program, resident, count, trips, far, memory, chip, work.again)

    run = at(min(work.trips, SHORT))
    cycles = total(run)
    if work.trips > SHORT:
        run = at(min(work.trips, LONG))
        further = (total(run) - cycles) / (min(work.trips, LONG) - SHORT)
        cycles = total(run) + further * max(0, work.trips - LONG)
    return cycles, {name: value / run.ends[-1] for name, value in run.busy.items()}


def beyond_l1(program: Program, work: Work) -> float:
    """Bytes that a program loads from and stores to the L2 and the memory, by its instructions."""
    issued, loaded = (issued_bytes(program.code, work.trips, names) for names in (GLOBAL, {"LDG"}))
    return program.warps * (issued - work.again * loaded)


def _simulated(program: Program, resident: int, count: int, trips: int, far: float, memory: float, chip: Chip,
               again: float) -> Run:  # fmt: skip
    """Run the model, or read what an earlier run found; the cache, ``machine/`` beside the timed choices, knows its
    source.
    """
    if reason := unmodelled(program.code):
        raise ValueError(reason)
    key = repr((program, resident, count, trips, round(far, 4), round(memory, 4), chip, round(again, 4), _source()))
    path = cached("run", key)
    try:
        return Run(*json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        pass
    run = Multiprocessor(program.code, program.warps, resident, count, trips, far, memory, chip, again).run()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(json.dumps(run).encode())
    return run


@cache
def _source() -> str:
    files = (Path(module.__file__) for module in (assembly, banks, loops, multiprocessor, pipes) if module.__file__)
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
