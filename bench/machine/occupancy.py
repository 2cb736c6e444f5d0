"""How many programs run on a multiprocessor at once."""

from __future__ import annotations

from bench.machine.chips import PROGRAM_SHARED, Chip
from bench.machine.pipes import WARP

REGISTERS_A_WARP = (
    256  # registers are given out to a warp by so many (CUDA C++ Programming Guide, as its occupancy API)
)


def residents(registers: int, shared: int, warps: int, chip: Chip) -> int:
    """Programs at once.

    Args:
        registers: of a thread.
        shared: bytes of a program.
        warps: of a program.

    Raises:
        ValueError: where not even one fits.
    """
    of_a_warp = -(-registers * WARP // REGISTERS_A_WARP) * REGISTERS_A_WARP
    limits = {
        "registers": chip.registers // (of_a_warp * warps),
        "shared memory": chip.shared // (shared + PROGRAM_SHARED),
        "warps": chip.most_warps // warps,
        "programs": chip.most_programs,
    }
    scarce = min(limits, key=limits.__getitem__)
    if not limits[scarce]:
        raise ValueError(f"a program of {warps} warps, {registers} registers and {shared} bytes does not fit: {scarce}")
    return limits[scarce]
