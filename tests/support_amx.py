"""The AMX form of tiles on processors without AMX: see ``ops/amx.cpp``."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).parent / "ops" / "amx.cpp"


@cache
def library() -> ctypes.CDLL | None:
    """The compiled emulation; None: of another processor or system, or there is no compiler."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if not (compiler and platform.machine() == "x86_64" and sys.platform == "linux"):
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "amx.so"
        command = [compiler, "-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared", str(SOURCE), "-o", str(path)]
        if subprocess.run(command, capture_output=True).returncode:
            return None
        loaded = ctypes.CDLL(str(path))
    loaded.computed_amx.restype = ctypes.c_int64
    return loaded


@contextmanager
def emulated() -> Iterator[ctypes.CDLL]:
    """Inside, AMX instructions of this process are computed.

    Raises:
        RuntimeError: where that is impossible, see `library`.
    """
    loaded = library()
    if loaded is None or loaded.take_amx():
        raise RuntimeError("AMX cannot be emulated here")
    try:
        yield loaded
    finally:
        loaded.give_amx_back()
