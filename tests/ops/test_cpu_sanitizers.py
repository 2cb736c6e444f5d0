"""The C++ under AddressSanitizer and UndefinedBehaviorSanitizer, on buffers of exactly their size, in all forms."""

import os
import subprocess
from pathlib import Path

import pytest

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


def test_no_access_beyond_a_buffer_and_no_undefined_behaviour(tmp_path):
    trivial = tmp_path / "trivial.cpp"
    trivial.write_text("int main() { return 0; }\n")
    if (program := compiled(tmp_path, trivial)) is None or run(program).returncode:
        pytest.skip("no compiler with sanitizers")
    program = compiled(tmp_path, Path(__file__).with_name("sanitized.cpp"), *build._SOURCES)
    assert program is not None, "the sources do not compile with sanitizers"
    result = run(program)
    assert result.returncode == 0 and result.stdout == "done 1\n", result.stderr[-3000:]
    short = run(program, "an output that is one element short")
    assert short.returncode and "AddressSanitizer" in short.stderr
