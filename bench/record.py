"""Raw results as JSON, each with what it takes to repeat it: commit, versions, machine."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import fastres
from fastres.atomic import atomic_write

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
LINE, ROW = 240, 1000  # characters of a line of JSON at most, and of one that is a row


def write_results(path: str | os.PathLike, data: dict[str, Any]) -> None:
    """Write ``data`` and `circumstances` to ``path`` atomically, as JSON with a row a line, see `as_lines`.

    Args:
        path: file; its folder is made if there is none.
        data: plain values, without a key of `circumstances`.

    Raises:
        ValueError: for a value that JSON has not, such as NaN, or a key that is taken.
        OSError: when the file cannot be written.
    """
    facts = circumstances()
    if taken := sorted(facts.keys() & data.keys()):
        raise ValueError(f"results cannot have the key {taken[0]!r}: it is the recorder's own")
    text = as_lines({**facts, **data}) + "\n"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(text.encode())


def as_lines(value: Any, indent: int = 0, is_row: bool = False) -> str:
    """JSON with a row a line, so that a difference shows what changed.

    A row is an element of a list that holds plain values and collections of them. A line of its own has also what holds
    plain values alone, and what is short.

    Args:
        indent: how deep the value lies.
        is_row: whether it is an element of a list.

    Raises:
        ValueError: for a value that JSON has not, such as NaN.
    """
    line = json.dumps(value, allow_nan=False)
    depth = _depth(value)
    longest = ROW if is_row and depth == 2 else LINE
    if depth == 0 or not value or indent > 0 and (depth == 1 or len(line) <= longest - indent):
        return line
    if isinstance(value, dict):
        parts = [f"{json.dumps(name)}: {as_lines(part, indent + 1)}" for name, part in value.items()]
    else:
        parts = [as_lines(part, indent + 1, is_row=True) for part in value]
    first, last = "{}" if isinstance(value, dict) else "[]"
    margin = "\n" + " " * indent
    return f"{first}{margin} " + f",{margin} ".join(parts) + f"{margin}{last}"


def _depth(value: Any) -> int:
    """How many collections lie in one another; of a plain value 0."""
    if not isinstance(value, (dict, list, tuple)):
        return 0
    return 1 + max(map(_depth, value.values() if isinstance(value, dict) else value), default=0)


def circumstances() -> dict[str, Any]:
    """Date in UTC, commit, versions, device, CPU and threads of this process."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
    }


def versions() -> dict[str, str | None]:
    """Of fastres, Python, PyTorch, CUDA, cuDNN and Triton; None for what is not there."""
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = None
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    return {
        "fastres": fastres.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": None if cudnn is None else str(cudnn),
        "triton": triton,
    }


def commit() -> str | None:
    """The checkout's commit, with ``-dirty`` where tracked files differ from it; None outside a checkout."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=ROOT, capture_output=True, text=True, check=True, timeout=30,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()


def cpu_name() -> str:
    """The processor's name as the kernel tells it, or the architecture's."""
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def main(argv: list[str] | None = None) -> None:
    """Write result files anew, values unchanged, as `write_results` would: ``python -m bench.record [FILE ...]``."""
    for path in [Path(name) for name in argv or sys.argv[1:]] or sorted(RESULTS.rglob("*.json")):
        content = path.read_bytes()
        lines = (as_lines(json.loads(content)) + "\n").encode()
        if lines != content:
            with atomic_write(path) as file:
                file.write(lines)
            print(path)


if __name__ == "__main__":
    main()
