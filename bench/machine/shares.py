"""What a kernel makes of a full GPU, by the model, and what is too little to be shipped."""

from __future__ import annotations

from bench.launches import Launch, Specialisation
from bench.machine.chips import CHIPS
from bench.machine.floors import floor_of
from bench.machine.occupancy import residents
from bench.machine.pipes import unmodelled
from bench.machine.predict import steady_share
from bench.machine.program import compiled
from bench.machine.work import MERGING, work_of
from bench.sass import Architecture, Resources


def occupancy(found: Resources, warps: int, arch: Architecture) -> int | None:
    """Programs that a multiprocessor runs at once; None: none fits, or the GPU is not known."""
    if not isinstance(arch, int) or arch not in CHIPS:
        return None
    try:
        return residents(found.registers, found.shared, warps, CHIPS[arch])
    except ValueError:
        return None


def share(launch: Launch, arch: int) -> float | None:
    """Of the bound that binds; None: the model says nothing of it."""
    if arch not in CHIPS or launch.specialisation.kernel in MERGING:
        return None
    program = compiled(launch.specialisation, arch)
    if unmodelled(program.code):
        return None
    try:
        return steady_share(program, work_of(launch, program), CHIPS[arch]).share
    except ValueError:  # does not fit: told by the resources
        return None


def fault(one: Specialisation, arch: Architecture, found: float | None) -> list[str]:
    """Why a first configuration is too slow to be shipped; empty: it is not."""
    floor = floor_of(one, arch) if isinstance(arch, int) else None
    if found is None or floor is None or found >= floor:
        return []
    return [f"{found:.1%} of its bound by the model, {floor:.1%} is the least"]
