"""The code is lint-free and its types agree, as far as pyproject.toml asks for it."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "tool, arguments",
    [("ruff", ["check", "--no-cache"]), ("ruff", ["format", "--check", "--no-cache"]), ("mypy", ["--cache-dir"])],
)
def test_has_no_complaint(tool, arguments, tmp_path):
    if find_spec(tool) is None:
        pytest.skip(f"{tool} is not installed")
    where = [str(tmp_path)] if tool == "mypy" else []
    done = subprocess.run([sys.executable, "-m", tool, *arguments, *where], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
