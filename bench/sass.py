"""What a compiled kernel needs and does: registers, spills, shared memory, width of loads and stores, tensor cores."""

from __future__ import annotations

import itertools
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton

from bench.machine.assembly import Instruction
from bench.machine.banks import conflicts

Architecture = int | str  # an NVIDIA compute capability, as 90, or the name of an AMD processor
# Shared memory a block can have, bytes (CUDA C++ Programming Guide, technical specifications by compute capability;
# AMD's instruction set manuals: the local data share).
SHARED_LIMIT: dict[Architecture, int] = {
    75: 64 * 1024,  # T4, GeForce RTX 20
    80: 163 * 1024,  # A100
    86: 99 * 1024,  # GeForce RTX 30, A40
    89: 99 * 1024,  # GeForce RTX 40, L40
    90: 227 * 1024,  # H100
    100: 227 * 1024,  # B200
    120: 99 * 1024,  # GeForce RTX 50
    "gfx942": 64 * 1024,  # MI300
}

INSTRUCTION_BYTES = 16  # since Volta
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+([^;]*);")
_PARTS = re.compile(r"(?:(?P<guard>@!?U?P\w+)\s+)?(?P<mnemonic>\S+)\s*(?P<operands>.*)")
_FRAME = re.compile(r"\bR1\b")
_FRAME_SET_UP = re.compile(r"(@!?U?P\w+ )?\S+ R1, (R1, |(RZ, RZ, )?c\[)")
_LOAD = re.compile(r"\b(?:LDG|LDGSTS)\.E\S*")
_STORE = re.compile(r"\bSTG\.E\S*")
_BULK = re.compile(r"\bUTMA(?:LDG|STG)\S*")  # tensor memory accelerator: whole tiles
_WIDTH = re.compile(r"\.(U8|S8|U16|S16|64|128|256)(?![0-9B])")
_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
_TENSOR_CORES = {
    "HMMA": re.compile(r"\bHMMA\."),
    "HGMMA": re.compile(r"\bHGMMA\."),  # wgmma
    "HGMMA, A in registers": re.compile(r"\bHGMMA\.\S+ R\d+, R\d+, gdesc"),
    "tcgen05": re.compile(r"\bUTC\w*MMA"),
}


# Bytes of stack a thread up to which an H100 took no longer for a configuration than for those without: it has fewer
# registers, and so more programs at once.
SPILLED: dict[Architecture, int] = {90: 80}
# Cycles of the shared memory's port over those without conflicts. Where operands of products are stored or read both
# ways there are up to 4.5 on Ampere, in pools of fp32 5.3; ends of blocks whose sums had all lanes in one bank had 8.3.
CONFLICTS = 6.0


class Resources(NamedTuple):
    """Of one kernel compiled for one architecture."""

    registers: int  # a thread
    stack: int  # bytes a thread of a frame that the code uses
    spills: int  # instructions that load or store local memory
    shared: int  # bytes a block
    wide_loads: float | None  # share of the bytes loaded by instructions of at least 16 bytes a thread; None: no loads
    wide_stores: float | None  # likewise
    tensor_cores: dict[str, int]  # instructions by kind
    dots: int  # `tl.dot`s that a tensor core can do: all but fp32 ones of full precision
    conflicts: float | None = None  # see `bench.machine.banks.conflicts`
    serial: int = 0  # see `serial_products`

    def faults(self, arch: Architecture) -> list[str]:
        """Why this kernel must not be shipped; empty: it may."""
        found = []
        if self.stack > SPILLED.get(arch, 0) or (self.spills and not self.stack):
            found.append(f"spills ({self.stack} bytes of stack, {self.spills} instructions)")
        if self.shared > SHARED_LIMIT[arch]:
            found.append(f"{self.shared} bytes of shared memory, {SHARED_LIMIT[arch]} there are")
        if self.dots and not self.tensor_cores:
            found.append("tl.dot without a tensor core")
        if (self.conflicts or 0.0) > CONFLICTS:
            found.append(f"{self.conflicts:.1f} times the cycles of the shared memory for conflicts between its banks")
        if self.serial:
            found.append(f"{self.serial} wgmmas are waited for before the next one of the same product")
        return found


def resources(kernels: Sequence[Any]) -> list[Resources]:
    """Read them from kernels that `triton.compile` made for one CUDA target.

    Raises:
        RuntimeError: if one of Triton's tools fails.
    """
    if not kernels:
        return []
    codes = disassembled([kernel.asm["cubin"] for kernel in kernels], kernels[0].metadata.target.arch)
    return [_resources(kernel, code) for kernel, code in zip(kernels, codes)]


def _resources(kernel: Any, code: str) -> Resources:
    usage, parsed = res_usage(kernel.asm["cubin"]), instructions(code)
    return Resources(
        registers=_usage("REG", usage),
        stack=_usage("STACK", usage) if uses_frame(code) else 0,
        spills=len(re.findall(r"\b(?:STL|LDL)\b", code)),
        shared=kernel.metadata.shared,
        wide_loads=_wide_share(_LOAD, code),
        wide_stores=_wide_share(_STORE, code),
        tensor_cores={name: len(found) for name, kind in _TENSOR_CORES.items() if (found := kind.findall(code))},
        dots=tensor_core_dots(kernel.asm["ttir"]),
        conflicts=conflicts(parsed),
        serial=serial_products(parsed),
    )


def serial_products(code: Sequence[Instruction]) -> int:
    """wgmmas that end before the next one to the same accumulators begins, though both operands are in shared memory.

    So ptxas has it where other instructions define accumulators between a product's begin and its end (its message
    C7515). Of operands in registers Triton waits itself, until those may be overwritten.
    """
    found, before, waited = 0, "", False
    for one in code:
        if one.name == "WARPGROUP" and "DEPBAR" in one.mnemonic:
            waited = waited or one.operands.endswith("0x0")
        elif one.name == "HGMMA":
            accumulators, *operands = one.operands.split(", ")
            shared = operands[0].startswith("gdesc")
            found += shared and waited and accumulators == before
            before, waited = accumulators if shared else "", False
        elif one.name == "BRA":
            before = ""  # what follows may be of another trip
    return found


def instructions(code: str) -> list[Instruction]:
    """Those of `disassembled`, without control fields."""
    matches = (_PARTS.match(line) for line in code.splitlines())
    return [Instruction(one["mnemonic"], one["operands"].strip(), one["guard"] or "") for one in matches if one]


def uses_frame(code: str) -> bool:
    """Whether instructions, one a line, do anything with the address of their stack frame, R1, but set it up.

    The compiler leaves a frame of 8 bytes where an object of the front end that is optimised away once was: no register
    was spilled, and nothing is stored there.
    """
    return any(_FRAME.search(line) and not _FRAME_SET_UP.match(line) for line in code.splitlines())


def disassembled(cubins: Sequence[bytes], arch: int) -> list[str]:
    """The instructions of compiled kernels, one a line.

    All are disassembled as one: ``nvdisasm`` takes longer to start than to read a kernel, and as long as its compiler.

    Args:
        cubins: all for the same architecture.
        arch: compute capability, as 90.

    Raises:
        RuntimeError: if Triton's ``nvdisasm`` fails, or finds other instructions than there are.
    """
    codes = [machine_code(cubin) for cubin in cubins]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.bin"
        path.write_bytes(b"".join(codes))
        text = _tool("nvdisasm", "-b", f"SM{arch}", path)
    lines = _INSTRUCTION.findall(text)
    counts = [len(code) // INSTRUCTION_BYTES for code in codes]
    if len(lines) != sum(counts):
        raise RuntimeError(f"nvdisasm finds {len(lines)} instructions of sm_{arch}, {sum(counts)} there are")
    each = iter(lines)
    return ["\n".join(itertools.islice(each, count)) for count in counts]


def machine_code(cubin: bytes) -> bytes:
    """The kernel's own section of a compiled kernel, an ELF file of 64 bits.

    Raises:
        RuntimeError: where there is none.
    """
    (table,) = struct.unpack_from("<Q", cubin, 0x28)  # e_shoff
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)  # e_shentsize, e_shnum, e_shstrndx
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + size * index) for index in range(count)]
    found = []
    for name, _, _, _, offset, length in sections:
        if cubin.startswith(b".text.", sections[names][4] + name):
            found.append(cubin[offset : offset + length])
    if not found:
        raise RuntimeError("a compiled kernel without a section of machine code")
    return b"".join(found)


def registers(cubin: bytes) -> int:
    """Registers a thread of a compiled kernel.

    Raises:
        RuntimeError: if Triton's ``cuobjdump`` fails.
    """
    return _usage("REG", res_usage(cubin))


def res_usage(cubin: bytes) -> str:
    """What Triton's ``cuobjdump`` tells of a compiled kernel's needs.

    Raises:
        RuntimeError: if it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return _tool("cuobjdump", "-res-usage", path)


def _usage(name: str, text: str) -> int:
    found = re.search(rf"{name}:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump tells no {name}")
    return int(found[1])


def _wide_share(kind: re.Pattern, sass: str) -> float | None:
    widths: Counter[int] = Counter()
    for instruction in kind.findall(sass):
        width = _WIDTH.search(instruction)
        widths[_BYTES[width[1]] if width else 4] += 1
    widths[16] += len(_BULK.findall(sass)) if kind is _LOAD else 0
    total = sum(width * count for width, count in widths.items())
    return sum(width * count for width, count in widths.items() if width >= 16) / total if total else None


def tensor_core_dots(ttir: str) -> int:
    """Products that a tensor core can do: all but fp32 ones of full precision."""
    dots = [line for line in ttir.splitlines() if "tt.dot " in line]
    return sum(not ("xf32>" in line.split(":", 1)[1].split("*")[0] and "tf32" not in line) for line in dots)


def _tool(name: str, *arguments: str | Path) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([path, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} {' '.join(map(str, arguments))}: {done.stderr.strip()}")
    return done.stdout + done.stderr
