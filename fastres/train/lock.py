"""One process at a time in a folder."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import weakref
from pathlib import Path

from fastres.atomic import is_lacking, warn_once
from fastres.errors import FastresError


class Lock:
    """An exclusive lock on a file that it makes where there is none, and never writes to.

    Where the file system has no locks, a warning is said once and the process goes on without.

    Raises:
        FastresError: when another process holds it, or what has its name is no plain file.
        OSError: when the file cannot be made.
    """

    def __init__(self, path: Path, in_use: str):
        self.path = path
        # O_NONBLOCK: a pipe of that name must not make it wait
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            self._handle = os.open(path, flags, 0o666)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise self._no_file() from None
            raise
        try:
            if not stat.S_ISREG(os.fstat(self._handle).st_mode):
                raise self._no_file()
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if not is_lacking(error):
                os.close(self._handle)
                raise FastresError(in_use) from None
            warn_once(
                f"the file system of {path.parent} has no locks ({error.strerror}): see yourself that no two runs "
                "write there at once"
            )
        except FastresError:
            os.close(self._handle)
            raise
        _HELD.add(self)

    def _no_file(self) -> FastresError:
        return FastresError(f"{self.path} is not a plain file: remove it or choose another --out")

    def release(self) -> None:
        """Let others in."""
        if self in _HELD:
            _HELD.discard(self)
            os.close(self._handle)


_HELD: weakref.WeakSet[Lock] = weakref.WeakSet()


def _leave_to_parent() -> None:
    """A forked process would hold the locks for as long as it lives, though its parent was killed."""
    for lock in list(_HELD):
        lock.release()


os.register_at_fork(after_in_child=_leave_to_parent)
