"""Files that are written whole or not at all, on file systems that lack some of what Linux's own have too."""

from __future__ import annotations

import errno
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO

logger = logging.getLogger(__name__)
# what network, FUSE and container file systems answer to a call that they do not have
_LACKING = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.[a-z0-9_]{8}\.tmp")  # as `atomic_write` names its temporary files


def is_lacking(error: OSError) -> bool:
    """Whether an error says that the file system does not have the call, and not that the call failed."""
    return error.errno in _LACKING


@cache
def warn_once(message: str) -> None:
    """Log a warning, each text once a process; bytes of file names that are not UTF-8 are written as escapes."""
    logger.warning("warning: %s", message.encode("utf-8", "backslashreplace").decode("utf-8"))


@contextmanager
def atomic_write(path: str | os.PathLike, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Yield a binary file whose content takes the place of ``path`` when the block ends without an exception.

    The content goes to a temporary file in the same folder, is flushed to the disk and then renamed, so a
    crash at any moment leaves the former file or the new one, never a part. After an exception the former
    file stays. A file system that cannot flush costs one warning.

    Args:
        mode: permissions of the file, from which the process's mask is taken as from those of any new file.

    Raises:
        OSError: when the folder cannot be written or the disk is full.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            _sync(file.fileno(), path.parent)
        with suppress(
            OSError
        ):  # mkstemp makes files that only their owner can read; some file systems have one mode for all
            os.chmod(temporary, mode & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_folder(path.parent)


def leftovers(folder: Path, names: Iterable[str] | None = None, age: float = 0.0) -> list[Path]:
    """Temporary files of `atomic_write` that a killed process left in a folder.

    Args:
        names: of these files only; None: of any.
        age: seconds that they must be old, as another process may be writing.
    """
    wanted, found = None if names is None else set(names), []
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            match = _LEFTOVER.fullmatch(entry.name)
            if match is None or (wanted is not None and match["name"] not in wanted):
                continue
            with suppress(OSError):
                if entry.is_file(follow_symlinks=False) and time.time() - entry.stat().st_mtime >= age:
                    found.append(Path(entry.path))
    return found


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(handle: int, folder: Path) -> None:
    try:
        os.fsync(handle)
    except OSError as error:
        if not is_lacking(error):
            raise
        warn_once(
            f"the file system of {folder} cannot flush files ({error.strerror}): what is written may be lost when the "
            "machine goes down"
        )


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the file system knows how."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
