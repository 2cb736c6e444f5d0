"""A kernel as a GPU would get it: its machine code and what it needs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget

from bench.launches import Specialisation
from bench.machine.assembly import Instruction, disassemble, parse
from bench.sass import registers
from fastres.atomic import atomic_write
from fastres.ops.timing import choices_path


class Program(NamedTuple):
    """Of one specialisation on one architecture."""

    code: tuple[Instruction, ...]
    registers: int  # a thread
    shared: int  # bytes a program
    warps: int  # a program


def compiled(specialisation: Specialisation, arch: int) -> Program:
    """Compile for ``sm_<arch>``, or read what an earlier run did: ``machine/`` beside the timed choices.

    Raises:
        Exception: whatever the compiler raises.
    """
    source = specialisation.source()
    key = f"{source.hash()} {specialisation.options} sm_{arch} triton {triton.__version__}"
    path = cached("program", key)
    try:
        kept = json.loads(path.read_text())
        return Program(tuple(parse(kept.pop("assembly"))), **kept)
    except (OSError, ValueError, TypeError):
        pass
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(specialisation.options))
    assembly = disassemble(kernel.asm["cubin"])
    needs = {
        "registers": registers(kernel.asm["cubin"]),
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(json.dumps({"assembly": assembly, **needs}).encode())
    return Program(tuple(parse(assembly)), **needs)


def cached(kind: str, key: str) -> Path:
    """The file of the cache for what depends on ``key`` alone."""
    return choices_path().parent / "machine" / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()}.json"
