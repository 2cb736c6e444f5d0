"""Where this machine's own results are kept: decoded images, timed choices, compiled passes."""

from __future__ import annotations

import atexit
import os
import shutil
import stat
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

from fastres.atomic import leftovers, warn_once

_KINDS = {
    "*.npz": "decoded images",
    "*.images.json": "folders' contents",
    "passes-*.so": "compiled passes",
    "pages-*.so": "compiled memory allocator",
    "choices.json": "timed choices",
}
_BUILDS = "build-*"  # folders that a compiler writes to
_HOUR = 3600.0  # a temporary file or folder as old as this is nobody's any more


def cache_folder() -> Path:
    """The first of these that can be made or written; what writes there makes it, for this user alone.

    ``$FASTRES_CACHE``, ``$XDG_CACHE_HOME/fastres``, ``~/.cache/fastres``, and where a user has no home, as in many a
    container, a private one among the temporary files.
    """
    return _first_writable(*_candidates())


def private_folder() -> Path:
    """The first of `cache_folder`'s places that no other user can write to: code is loaded from nowhere else."""
    found = next(filter(_made_private, _candidates()), None) or _temporary()
    if found != (wanted := cache_folder()):
        warn_once(f"compiled code is kept in {found}, as other users can write to {wanted}: take that right from them")
    return found


def _made_private(folder: Path) -> bool:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if folder.name == "fastres" and status.st_uid == os.geteuid():  # no folder that somebody chose for many
            folder.chmod(status.st_mode & 0o7755)
        return is_private(folder) and os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        return False


def is_private(path: Path) -> bool:
    """Whether a file or folder belongs to this user or the system, and no other user can write to it."""
    try:
        status = path.stat()
    except OSError:
        return False
    return status.st_uid in (0, os.geteuid()) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _candidates() -> tuple[Path, ...]:
    found = []
    if folder := os.environ.get("FASTRES_CACHE"):
        found.append(Path(folder))
    if folder := os.environ.get("XDG_CACHE_HOME"):
        found.append(Path(folder) / "fastres")
    with suppress(RuntimeError):  # a user whom the system does not know
        home = Path.home()
        if home.is_dir() and home != Path("/"):  # which is what an empty HOME, or a container without users, gives
            found.append(home / ".cache" / "fastres")
    return tuple(found)


@cache
def _first_writable(*folders: Path) -> Path:
    for folder in folders:
        if (reason := _why_not(folder)) is None:
            return folder
        warn_once(f"the cache folder {folder} cannot be used ({reason}): set FASTRES_CACHE to another one")
    return _temporary()


def _why_not(folder: Path) -> str | None:
    """Why a folder cannot be made or written; None: it can."""
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        return f"{existing} is no folder"
    return None if os.access(existing, os.W_OK | os.X_OK) else "Permission denied"


@cache
def _temporary() -> Path:
    """A private folder that later processes of this user find again, or one for this process alone."""
    folder = Path(tempfile.gettempdir()) / f"fastres-{os.geteuid()}"
    with suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077:
            return folder
    own = Path(tempfile.mkdtemp(prefix="fastres-"))
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    return own


def kept(folder: Path) -> list[tuple[Path, str, int]]:
    """Files of fastres in a cache folder, with what they are and their sizes in bytes."""
    found = []
    for pattern, meaning in _KINDS.items():
        for path in sorted(folder.glob(pattern)):
            with suppress(OSError):
                if path.is_file():
                    found.append((path, meaning, path.stat().st_size))
    return found


def clear(folder: Path) -> int:
    """Remove the files of fastres from a cache folder, and what killed processes left; returns their number."""
    paths = [path for path, *_ in kept(folder)] + remove_leftovers(folder, age=0.0)
    for path in paths:
        with suppress(OSError):  # leftovers are gone already
            path.unlink(missing_ok=True)
    return len(paths)


def remove_leftovers(folder: Path, age: float = _HOUR) -> list[Path]:
    """Remove what processes left in a cache folder that were killed while they wrote or compiled there."""
    files = leftovers(folder, age=age)
    for file in files:
        file.unlink(missing_ok=True)
    for build in folder.glob(_BUILDS):
        with suppress(OSError):
            if _age(build) >= age and build.is_dir() and not build.is_symlink():
                shutil.rmtree(build, ignore_errors=True)
                files.append(build)
    return files


def _age(path: Path) -> float:
    return time.time() - path.stat().st_mtime
