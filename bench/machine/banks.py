"""Conflicts between the banks of the shared memory: the cycles that each access keeps its port.

Which words the lanes of a warp touch is in the machine code: addresses are made of the thread's number by integer
arithmetic, which is computed here for the first warp, in the order of the code and through each loop once. An access
whose address depends on anything else (a loaded value, an argument of the kernel) is not known.

32 banks of 4 bytes serve a word each a cycle; lanes that ask for the same word share it. Of 8 bytes a lane half of a
warp is served at once, of 16 a quarter (CUDA C++ Programming Guide, shared memory of compute capability 5.x and later).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from bench.machine.assembly import Instruction
from bench.machine.pipes import SHARED, WARP, moved, thread_bytes

BANKS, WORD, ROW = 32, 4, 16  # bytes of a word, and of a row that LDSM and STSM take at once
_LANES = np.arange(WARP, dtype=np.int64)
_BITS = 0xFFFFFFFF
# What special registers are in the first warp of the first program.
_SPECIAL = {"SR_TID.X": _LANES, "SR_LANEID": _LANES, "SR_CgaCtaId": 0 * _LANES}
_SPECIAL |= {f"SR_CTAID.{axis}": 0 * _LANES for axis in "XYZ"}

_RELATIONS = {"LT": np.less, "LE": np.less_equal, "GT": np.greater, "GE": np.greater_equal, "EQ": np.equal,
              "NE": np.not_equal}  # fmt: skip

Value = np.ndarray | None  # of each lane, 32 bits without a sign; None: not known


def addresses(code: Sequence[Instruction]) -> list[Value]:
    """For each access of the shared memory the bytes at which the lanes' own begin [32]; None where they are not known,
    and for other instructions."""
    warp, found = _Warp(), []
    for one in code:
        found.append(warp.address(one.operands) if one.name in SHARED and not one.never else None)
        warp.run(one)
    return found


def port_cycles(code: Sequence[Instruction]) -> list[int | None]:
    """For each instruction the cycles that a warp's access keeps the port of the shared memory; None as of
    `addresses`."""
    return [None if at is None else access_cycles(at, one) for at, one in zip(addresses(code), code, strict=True)]


def conflicts(code: Sequence[Instruction]) -> float | None:
    """Cycles of all accesses in the code, each once, over what their bytes alone take; None: the code has none."""
    pairs = [(moved(one) / (BANKS * WORD), found or 0) for one, found in zip(code, port_cycles(code))
             if one.name in SHARED and not one.never]  # fmt: skip
    least = sum(least for least, _ in pairs)
    return sum(max(pair) for pair in pairs) / least if least else None


def access_cycles(address: np.ndarray, one: Instruction) -> int:
    """Cycles of one access whose lanes begin at ``address`` [32], bytes."""
    size = thread_bytes(one.mnemonic)
    if one.name in ("LDSM", "STSM"):  # a row's address is one lane's
        rows, together, size = WARP * size // ROW, ROW // 2, ROW
    else:
        rows, together = WARP, min(WARP, WARP * WORD // size)
    return sum(_served(address[first : first + together], size) for first in range(0, rows, together))


def _served(address: np.ndarray, size: int) -> int:
    """Cycles for lanes that are served together: the most words of one bank."""
    words = {word for begin in address.tolist() for word in range(begin // WORD, (begin + size - 1) // WORD + 1)}
    return int(np.bincount([word % BANKS for word in words]).max())


class _Operands(NamedTuple):
    """Of an instruction, by kind."""

    registers: list[str]  # with numbers and all that is no predicate; the first is written
    written: list[str]  # predicates in front of the sources
    read: list[str]  # predicates behind them


def _operands(one: Instruction) -> _Operands:
    found = _Operands([], [], [])
    for operand in filter(None, (part.strip().removesuffix(".reuse") for part in one.operands.split(","))):
        if not re.fullmatch(r"!?U?P(T|\d+)", operand):
            found.registers.append(operand)
        elif len(found.registers) < 2 and operand[0] != "!":
            found.written.append(operand)
        else:
            found.read.append(operand)
    return found


class _Warp:
    """The registers of a warp, as far as integer arithmetic on the thread's number tells them."""

    def __init__(self) -> None:
        zero = 0 * _LANES
        self._known: dict[str, np.ndarray] = {"RZ": zero, "URZ": zero, "PT": zero + 1, "UPT": zero + 1}
        self._constant = frozenset(self._known)

    def address(self, operands: str) -> Value:
        """The sum in an instruction's first brackets."""
        match = re.search(r"\[([^\]]*)\]", operands)
        total: Value = 0 * _LANES if match else None
        for term in match[1].split("+") if match else []:
            name, _, times = term.partition(".X")
            value = self._read(name)
            total = None if total is None or value is None else (total + value * int(times or 1)) & _BITS
        return total

    def run(self, one: Instruction) -> None:
        """Change what an instruction writes."""
        if one.name in ("STS", "STSM"):
            return
        operands = _operands(one)
        value, holds = self._computed(one, operands)
        for place, target in enumerate(_targets(one, operands)):
            self._write(one, target, value if place == 0 or one.name == "CS2R" else None)
        for place, target in enumerate(operands.written):
            self._write(one, target, holds if place == 0 else None)

    def _write(self, one: Instruction, target: str, value: Value) -> None:
        if target in self._constant:
            return
        if one.guard and value is not None:
            guard, before = self._read(one.guard.removeprefix("@")), self._known.get(target)
            value = None if guard is None or before is None else np.where(guard != 0, value, before)
        self._known.pop(target, None)
        if value is not None:
            self._known[target] = value

    def _read(self, operand: str) -> Value:
        """A register, a predicate or a number, with the sign in front of it."""
        match = re.fullmatch(r"([-~!]?)(0x[0-9a-f]+|U?[RP][ZT\d]+)", operand)
        if match is None:
            return None
        number = match[2][0] == "0"
        value = 0 * _LANES + (int(match[2], 16) & _BITS) if number else self._known.get(match[2])
        if value is not None and match[1]:
            value = {"-": -value, "~": ~value, "!": 1 - value}[match[1]]
        return None if value is None else value & _BITS

    def _computed(self, one: Instruction, operands: _Operands) -> tuple[Value, Value]:
        """What is written to the register and to the first predicate."""
        name, last = one.name.removeprefix("U"), operands.registers[-1] if operands.registers else ""
        if name in ("S2R", "S2UR"):
            return _SPECIAL.get(last), None
        if name == "CS2R":
            return (0 * _LANES if last == "SRZ" else None), None
        compares = name == "ISETP"
        sources = [self._read(each) for each in operands.registers[0 if compares else 1 :]]
        if compares or name == "SEL":
            sources += [self._read(each) for each in operands.read]
        if name not in _ARITHMETIC or not sources or any(value is None for value in sources):
            return None, None
        try:
            value = _ARITHMETIC[name](one.mnemonic, *sources)
        except (IndexError, TypeError):  # a form with other operands
            return None, None
        if value is None or compares:
            return None, value
        value = value & _BITS
        return value, (value != 0).astype(np.int64) if name == "LOP3" else None


def _targets(one: Instruction, operands: _Operands) -> list[str]:
    """Registers that are written."""
    match = re.fullmatch(r"(U?R)(\d+)", operands.registers[0]) if operands.registers else None
    if match is None or one.name in ("ISETP", "UISETP"):
        return []
    wide = re.search(r"\.64|WIDE|^CS2R|^D[A-Z]", one.mnemonic)
    count = 4 if ".128" in one.mnemonic or one.name == "LDSM" else 2 if wide else 1
    return [f"{match[1]}{int(match[2]) + place}" for place in range(count)]


def _signed(value: np.ndarray) -> np.ndarray:
    return ((value & _BITS) ^ 0x80000000) - 0x80000000


def _multiply_add(mnemonic: str, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> Value:
    return None if re.search(r"\.(HI|X)\b", mnemonic) else a * b + c


def _add(mnemonic: str, *terms: np.ndarray) -> Value:
    return None if ".X" in mnemonic else sum(terms[1:], terms[0])


def _load_address(mnemonic: str, a: np.ndarray, b: np.ndarray, *rest: np.ndarray) -> Value:
    """``(a << n) + b``, or of the high half ``(c, a) << n`` plus b."""
    if ".X" in mnemonic:
        return None
    if ".HI" in mnemonic:
        return b + (((rest[0] << 32 | a) << rest[1]) >> 32)
    return (a << rest[0]) + b


def _shift(mnemonic: str, low: np.ndarray, count: np.ndarray, high: np.ndarray) -> Value:
    if "64" in mnemonic:
        return None
    if ".L." in mnemonic:
        return low << count
    return (_signed(high) if ".S32" in mnemonic else high) >> count if ".HI" in mnemonic else low >> count


def _logic(mnemonic: str, a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray, *_: np.ndarray) -> Value:
    """Bit i of the table is the result where the bits of a, b and c are those of i."""
    found = 0 * a
    for entry in range(8):
        if int(table[0]) >> entry & 1:
            found |= (a if entry & 4 else ~a) & (b if entry & 2 else ~b) & (c if entry & 1 else ~c)
    return found


def _permute(mnemonic: str, a: np.ndarray, selector: np.ndarray, b: np.ndarray) -> Value:
    """Each half byte of the selector names a byte of (b, a)."""
    if mnemonic.count(".") or (selector & 0x8888).any():
        return None
    both, found = b << 32 | a, 0 * a
    for place in range(4):
        found |= (both >> 8 * (selector >> 4 * place & 7) & 0xFF) << 8 * place
    return found


def _narrow(mnemonic: str, a: np.ndarray, bits: np.ndarray) -> Value:
    kept = a & ((1 << bits) - 1)
    return kept if ".U32" in mnemonic else np.where(kept >> (bits - 1) & 1 != 0, kept - (1 << bits), kept)


def _compare(mnemonic: str, a: np.ndarray, b: np.ndarray, *chosen: np.ndarray) -> Value:
    if ".EX" in mnemonic or not chosen:
        return None
    if ".U32" not in mnemonic:
        a, b = _signed(a), _signed(b)
    relation = next((holds for name, holds in _RELATIONS.items() if f".{name}" in mnemonic), None)
    if relation is None:
        return None
    found = relation(a, b)
    combined = found & (chosen[0] != 0) if ".AND" in mnemonic else found | (chosen[0] != 0)
    return combined.astype(np.int64)


# By mnemonic without suffixes and without the U of uniform registers; the arguments are the mnemonic and the sources.
_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "MOV": lambda _, a: a,
    "R2UR": lambda _, a: 0 * a + a[0],
    "IMAD": _multiply_add,
    "IADD3": _add,
    "VIADD": _add,
    "LEA": _load_address,
    "SHF": _shift,
    "LOP3": _logic,
    "PRMT": _permute,
    "SGXT": _narrow,
    "SEL": lambda _, a, b, chosen: np.where(chosen != 0, a, b),
    "ISETP": _compare,
}
