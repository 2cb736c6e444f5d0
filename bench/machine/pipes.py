"""Which pipe an instruction occupies, for how long, and how many bytes it moves.

Cycles are of a warp's 32 threads on one of the four quarters of a multiprocessor, from the results per clock in the
CUDA C++ Programming Guide's table of arithmetic throughput: 16 lanes a quarter take two cycles, the 4 of the
transcendental unit eight.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from bench.machine.assembly import Instruction
from bench.machine.chips import Chip

WARP, QUARTERS, WARPGROUP = 32, 4, 4
HALF_RATE, QUARTER_RATE = 2, 8  # cycles of a warp on 16 lanes, and on 4
TENSOR = {"HGMMA", "HMMA"}
SHARED = {"LDS", "LDSM", "STS", "STSM"}
GLOBAL = {"LDG", "STG", "LDGSTS", "LDL", "STL"}
_FMA = {"FFMA", "FADD", "FMUL", "HFMA2", "HADD2", "HMUL2"}
_TRANSCENDENTAL = {"MUFU", "I2F", "F2I", "I2FP", "POPC", "FLO", "F2F", "DADD", "DMUL", "DFMA"}
_NO_PIPE = {"BAR", "LDGDEPBAR", "DEPBAR", "WARPGROUP", "MEMBAR", "FENCE", "BRA", "EXIT", "NOP", "LDC", "S2R", "CS2R",
            "WARPSYNC", "ERRBAR", "CCTL", "BSSY", "BSYNC", "CALL", "RET", "WARPGROUPSET", "ACQBULK"}  # fmt: skip
_MEMORY = SHARED | GLOBAL | {"SHFL", "REDUX", "ATOMS", "ATOM", "RED"}
_WIDTHS = ((".128", 16), (".64", 8), (".U16", 2), (".S16", 2), (".U8", 1), (".S8", 1))
_MATRICES = {".M88.4": 16, ".M88.2": 8}  # bytes a thread of LDSM and STSM
_MMA = {"16816": (16, 8, 16), "1688": (16, 8, 8), "1684": (16, 8, 4)}
# Their shapes and arrivals are in descriptors that the kernel makes at run time, so that machine code does not tell
# them.
_DESCRIBED = re.compile(r"UTC\w*MMA|UTMA|LDTM|STTM")


def unmodelled(code: Iterable[Instruction]) -> str:
    """Why the model says nothing of this code; empty: it does."""
    found = sorted({match[0] for one in code if (match := _DESCRIBED.match(one.mnemonic))})
    return f"{', '.join(found)}: what they do is not in the machine code" if found else ""


def pipe(one: Instruction) -> tuple[str, int]:
    """The pipe of a quarter that an instruction goes through, empty if none is ever short, and its cycles there."""
    name = one.name
    if name in TENSOR or name in _NO_PIPE:
        return "", 0
    if name in _FMA:
        return "fma", HALF_RATE
    if name == "IMAD":
        return "imad", HALF_RATE  # shares the first fma pipe
    if name in _TRANSCENDENTAL:
        return "transcendental", QUARTER_RATE
    if name in _MEMORY:
        return "memory", HALF_RATE
    if name.startswith("U") or name in ("R2UR", "S2UR"):
        return "uniform", HALF_RATE
    return "alu", HALF_RATE


def thread_bytes(mnemonic: str) -> int:
    """Bytes that a thread loads or stores."""
    for suffix, size in _MATRICES.items():
        if suffix in mnemonic:
            return size
    return next((size for suffix, size in _WIDTHS if suffix in mnemonic), 4)


def moved(one: Instruction) -> int:
    """Bytes that a warp moves: no less where lanes read the same word, since a wavefront is what the port passes."""
    return 0 if one.never else WARP * thread_bytes(one.mnemonic)


def mma_shape(one: Instruction) -> tuple[int, int, int]:
    """Rows, columns and depth of a tensor-core instruction.

    Raises:
        ValueError: for one that is not known.
    """
    if found := re.search(r"\.(\d+)x(\d+)x(\d+)", one.mnemonic):
        rows, columns, depth = map(int, found.groups())
        return rows, columns, depth
    if (found := re.search(r"HMMA\.(\d+)", one.mnemonic)) and found[1] in _MMA:
        return _MMA[found[1]]
    raise ValueError(f"{one.mnemonic}: shape unknown")


def operations(one: Instruction) -> int:
    """Of a tensor-core instruction, by a warp (HMMA) or a warp group (HGMMA); of others none."""
    if one.name not in TENSOR:
        return 0
    rows, columns, depth = mma_shape(one)
    return 2 * rows * columns * depth


def tensor_cycles(one: Instruction, chip: Chip) -> float:
    """Of all four tensor cores for a wgmma, of one for an mma.sync. tf32 takes twice the cycles of an operation."""
    slower = 2 if "TF32" in one.mnemonic else 1
    if one.name == "HGMMA":
        return slower * operations(one) / chip.tensor
    return slower * operations(one) / (chip.tensor / QUARTERS * chip.mma_sync)


def wgmma_bytes(one: Instruction) -> int:
    """What a wgmma reads from the shared memory: its right operand, and the left one unless that is in registers."""
    rows, columns, depth = mma_shape(one)
    size = 4 if "TF32" in one.mnemonic else 2
    left = 0 if re.match(r"R\d+, R\d+, gdesc", one.operands) else rows
    return (left + columns) * depth * size
