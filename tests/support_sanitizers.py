"""Programs of C++ under AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import subprocess
from pathlib import Path

from fastres.ops.cpu import build

SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g1")
ENVIRONMENT = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}


def compiled(folder: Path, *sources: Path) -> Path | None:
    """The program of these sources; None where the compiler or its sanitizers are missing."""
    try:
        compiler = build._compiler()
    except FileNotFoundError:
        return None
    program = folder / "program"
    for cpu in build._FOR_THIS_CPU:
        command = [*compiler, "-std=c++17", "-fopenmp", "-w", *SANITIZERS, *cpu, *map(str, sources), "-o", str(program)]
        if subprocess.run(command, capture_output=True, timeout=300).returncode == 0:
            return program
    return None


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([program, *arguments], capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
