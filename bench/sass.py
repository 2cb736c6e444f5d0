"""What a compiled kernel needs and does: registers, spills, shared memory, width of loads and stores, tensor cores."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import triton

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


class Resources(NamedTuple):
    """Of one kernel compiled for one architecture."""

    registers: int  # a thread
    stack: int  # bytes a thread
    spills: int  # instructions that load or store local memory
    shared: int  # bytes a block
    wide_loads: float | None  # share of the bytes loaded by instructions of at least 16 bytes a thread; None: no loads
    wide_stores: float | None  # likewise
    tensor_cores: dict[str, int]  # instructions by kind
    dots: int  # `tl.dot`s that a tensor core can do: all but fp32 ones of full precision

    def faults(self, arch: Architecture) -> list[str]:
        """Why this kernel must not be shipped; empty: it may."""
        found = []
        if self.stack or self.spills:
            found.append(f"spills ({self.stack} bytes of stack, {self.spills} instructions)")
        if self.shared > SHARED_LIMIT[arch]:
            found.append(f"{self.shared} bytes of shared memory, {SHARED_LIMIT[arch]} there are")
        if self.dots and not self.tensor_cores:
            found.append("tl.dot without a tensor core")
        return found


def resources(kernel: Any) -> Resources:
    """Read them from a kernel that `triton.compile` made for a CUDA target.

    Raises:
        RuntimeError: if Triton's ``cuobjdump`` fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        text = _cuobjdump(path, "-res-usage", "-sass")
    return Resources(
        registers=_usage("REG", text),
        stack=_usage("STACK", text),
        spills=len(re.findall(r"\b(?:STL|LDL)\b", text)),
        shared=kernel.metadata.shared,
        wide_loads=_wide_share(_LOAD, text),
        wide_stores=_wide_share(_STORE, text),
        tensor_cores={name: len(found) for name, kind in _TENSOR_CORES.items() if (found := kind.findall(text))},
        dots=tensor_core_dots(kernel.asm["ttir"]),
    )


def registers(cubin: bytes) -> int:
    """Registers a thread of a compiled kernel.

    Raises:
        RuntimeError: if Triton's ``cuobjdump`` fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return _usage("REG", _cuobjdump(path, "-res-usage"))


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


def _cuobjdump(path: Path, *options: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([tool, *options, path], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"cuobjdump {' '.join(options)}: {done.stderr.strip()}")
    return done.stdout + done.stderr
