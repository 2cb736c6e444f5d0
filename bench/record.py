"""Raw results as JSON, each with what it takes to repeat it: commit, versions, machine."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import fastres
from fastres.atomic import atomic_write

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def write_results(path: str | os.PathLike, data: dict[str, Any]) -> None:
    """Write ``data`` and `circumstances` to ``path`` atomically, as JSON that ends in a newline.

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
    text = json.dumps({**facts, **data}, indent=1, allow_nan=False) + "\n"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(text.encode())


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
