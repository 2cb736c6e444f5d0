"""Machine code as ``nvdisasm -hex`` prints it, with the control fields that the assembler wrote into every instruction.

Of the 128 bits of an instruction, since Volta: 105 to 108 cycles until the warp's next instruction may issue, 110 to
112 the scoreboard that is released with the result, 113 to 115 the one that is released when the operands have been
read, 116 to 121 the scoreboards to wait for. The encoding is NVIDIA's own and is not documented; these fields are as
public studies found them.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton

NO_SCOREBOARD = 7
_LINE = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,6})\*/\s+(?P<guard>@!?U?P\w+\s+)?(?P<mnemonic>[A-Za-z0-9_.]+)\s*(?P<operands>[^;]*);\s*"
    r"/\* 0x[0-9a-f]{16} \*/"
)
_HIGH = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_TARGET = re.compile(r"\.L_x_\d+")


class Instruction(NamedTuple):
    """One instruction and its control fields."""

    mnemonic: str  # with its suffixes, as HGMMA.64x128x16.F32.BF16
    operands: str = ""
    guard: str = ""  # predicate, as @!P0
    stall: int = 1
    write: int = NO_SCOREBOARD
    read: int = NO_SCOREBOARD
    wait: int = 0  # bit b: scoreboard b
    target: int | None = None  # index of the instruction that a branch goes to

    @property
    def name(self) -> str:
        """The mnemonic without suffixes."""
        return self.mnemonic.partition(".")[0]

    @property
    def never(self) -> bool:
        """Whether its predicate is the constant false."""
        return self.guard == "@!PT"


def parse(text: str) -> list[Instruction]:
    """Instructions of the only kernel in a disassembly, up to its last EXIT.

    Raises:
        ValueError: where there are none.
    """
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif found := _LINE.search(line):
            code.append(Instruction(found["mnemonic"], found["operands"].strip(), (found["guard"] or "").strip()))
        elif code and (high := _HIGH.match(line)):
            code[-1] = _with_control(code[-1], int(high[1], 16))
    if not code:
        raise ValueError("no instructions in the disassembly: it takes the output of nvdisasm -hex -c")
    for index, one in enumerate(code):
        if one.name == "BRA" and (target := _TARGET.search(one.operands)):
            code[index] = one._replace(target=labels.get(target[0]))
    last = max((index for index, one in enumerate(code) if one.name == "EXIT"), default=len(code) - 1)
    return code[: last + 1]


def _with_control(one: Instruction, high: int) -> Instruction:
    bits = high >> 41
    return one._replace(stall=bits & 15, write=bits >> 5 & 7, read=bits >> 8 & 7, wait=bits >> 11 & 63)


def disassemble(cubin: bytes) -> str:
    """What Triton's own ``nvdisasm`` makes of a compiled kernel.

    Raises:
        RuntimeError: if it fails.
    """
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run([tool, "-hex", "-c", path], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvdisasm: {done.stderr.strip()}")
    return done.stdout
