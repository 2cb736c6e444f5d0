"""The C++ under AddressSanitizer and UndefinedBehaviorSanitizer, on buffers of exactly their size, in all forms."""

from pathlib import Path

import pytest
from support_sanitizers import compiled, run

from fastres.ops.cpu import build


def test_no_access_beyond_a_buffer_and_no_undefined_behaviour(tmp_path):
    trivial = tmp_path / "trivial.cpp"
    trivial.write_text("int main() { return 0; }\n")
    if (program := compiled(tmp_path, trivial)) is None or run(program).returncode:
        pytest.skip("no compiler with sanitizers")
    program = compiled(tmp_path, Path(__file__).with_name("sanitized.cpp"), *build.PASSES.files)
    assert program is not None, "the sources do not compile with sanitizers"
    result = run(program)
    assert result.returncode == 0 and result.stdout == "done 1\n", result.stderr[-3000:]
    short = run(program, "an output that is one element short")
    assert short.returncode and "AddressSanitizer" in short.stderr
