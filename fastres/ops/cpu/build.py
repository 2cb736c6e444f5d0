"""Compile the C++ sources for this machine, once, and load them."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from fastres.atomic import atomic_write
from fastres.cache import is_private, private_folder, remove_leftovers

logger = logging.getLogger(__name__)
_HERE, _TORCH = Path(__file__).parent, Path(torch.__file__).parent
# not -ffast-math: it lets the compiler take it that nothing is NaN or infinite, and those must go through as in PyTorch
_FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-fPIC", "-shared")
# -march=native names the CPU on x86, -mcpu=native on ARM; the plain line is for compilers that know neither
_FOR_THIS_CPU = (("-march=native",), ("-mcpu=native",), ())
_SECONDS = 300


class Sources(NamedTuple):
    """What a library is made of."""

    name: str  # of its file
    title: str  # in a message
    files: tuple[Path, ...]  # that are compiled
    headers: tuple[Path, ...]
    flags: tuple[str, ...]  # behind the files


def _openmp() -> tuple[str, ...]:
    """PyTorch's own OpenMP, where it brings one: two of them would each keep their threads spinning."""
    folder = _TORCH / "lib"
    bundled = sorted([*folder.glob("libgomp*.so*"), *folder.glob("libiomp5*.so*")])
    return (str(bundled[0]), f"-Wl,-rpath,{folder}") if bundled else ()


PASSES = Sources(
    "passes",
    "the fused passes",
    tuple(
        _HERE / f"{name}.cpp"
        for name in (
            "passes",
            "weight_grad",
            "few_channels",
            "conv",
            "packing",
            "conv_calls",
            "max_pool",
            "program",
            "sgd",
        )
    ),
    tuple(_HERE / name for name in ("conv.h", "gelu.h", "plan.h", "slots.h", "tiles.h", "vectors.h", "window.h")),
    _openmp(),
)
PAGES = Sources(
    "pages",
    "the memory allocator",
    (_HERE / "pages.cpp",),
    (_HERE / "pages.h",),
    (f"-I{_TORCH / 'include'}", f"-L{_TORCH / 'lib'}", "-lc10", f"-Wl,-rpath,{_TORCH / 'lib'}"),
)


def unavailable() -> str | None:
    """In one line why the passes cannot be had here; None: they can."""
    return None if isinstance(_loaded(), ctypes.CDLL) else str(_loaded())


def library() -> ctypes.CDLL:
    """The compiled passes.

    Raises:
        RuntimeError: where they are `unavailable`.
    """
    loaded = _loaded()
    if isinstance(loaded, str):
        raise RuntimeError(loaded)
    return loaded


@cache
def _loaded() -> ctypes.CDLL | str:
    """The compiled passes, or in one line why there are none."""
    return load(PASSES)


def load(sources: Sources) -> ctypes.CDLL | str:
    """The compiled sources, or in one line why they cannot be had.

    The library is kept in a private cache folder under a name made of its sources, the compiler and the CPU, and its
    digest is checked before it is loaded. ``$CXX`` names the compiler, with arguments if need be, else the first of
    c++, g++ and clang++ is taken.
    """
    try:
        compiler = _compiler()
        path = private_folder() / f"{sources.name}-{_key(sources, compiler)}.so"
        if not _is_whole(path):  # not there yet, or damaged
            with _one_at_a_time(path.parent):  # ranks that start together: one compiles, the others wait for it
                if not _is_whole(path):
                    _compile(sources, compiler, path)
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # whole, but of a system whose libraries have changed
            _compile(sources, compiler, path)
            return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        return f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0]


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Context that one process of the machine is in, as far as the file system has locks; one that is killed leaves it.

    The lock is on the folder itself, so that no file of it is left.
    """
    handle = None
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _is_whole(path: Path) -> bool:
    """Whether a library is one that this user's `_compile` wrote, to the last bit."""
    try:
        content = path.read_bytes() if path.is_file() and is_private(path) else b""
    except OSError:
        return False
    library, digest = content[: -len(_seal(b""))], content[-len(_seal(b"")) :]
    return len(library) > 0 and digest == _seal(library)


def _seal(library: bytes) -> bytes:
    """What stands behind a library in its file, where the loader does not look."""
    return b"fastres sha256 " + hashlib.sha256(library).hexdigest().encode()


def _compiler() -> list[str]:
    """The compiler's path and its arguments."""
    named = os.environ.get("CXX")
    for name in [named] if named else ["c++", "g++", "clang++"]:
        command = [name] if shutil.which(name) else shlex.split(name)
        if command and (path := shutil.which(command[0])):
            return [path, *command[1:]]
    raise FileNotFoundError(f"no C++ compiler ({named or 'c++, g++, clang++'}): install one, or name it in CXX")


def _key(sources: Sources, compiler: list[str]) -> str:
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True, timeout=_SECONDS).stdout
    contents = [file.read_bytes() for file in (*sources.files, *sources.headers)]
    parts = [*contents, repr(compiler).encode(), version, _cpu().encode(), torch.__version__.encode()]
    return hashlib.sha256(b"\0".join([*parts, repr((_FLAGS, sources.flags)).encode()])).hexdigest()[:16]


def _cpu() -> str:
    """What the compiler's choice of instructions depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = ("model name", "flags", "Features")
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(names)}))


def _compile(sources: Sources, compiler: list[str], path: Path) -> None:
    """Write the library and its seal, whole or not at all.

    Raises:
        OSError, subprocess.SubprocessError: where the compiler or the folder fails.
    """
    remove_leftovers(path.parent)
    logger.warning("compiling %s for this CPU, once, which takes up to a minute: %s", sources.title, path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as folder:
        built = Path(folder) / path.name
        for cpu in _FOR_THIS_CPU:
            command = [*compiler, *_FLAGS, *cpu, *map(str, sources.files), *sources.flags, "-o", str(built)]
            result = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
            if result.returncode == 0:
                break
        else:
            raise OSError(f"{' '.join(command)} failed: {(result.stderr.strip() or 'no message').splitlines()[0]}")
        library = built.read_bytes()
        with atomic_write(path, mode=0o600) as file:
            file.write(library + _seal(library))
