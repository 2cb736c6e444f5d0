"""Standard output and error that outlast their reader: a closed pipe or terminal must not end a run."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

_GONE = (errno.EPIPE, errno.EIO)  # what a closed pipe and a closed terminal answer


class LastingStream:
    """A text stream that drops what nobody reads any more, and spells what its encoding lacks with backslashes.

    Args:
        stream: None, as Python has it where it was started with the stream closed, drops all.
        goes_on: whether the process goes on without a reader; else the first such write raises BrokenPipeError.
    """

    def __init__(self, stream: TextIO | None, goes_on: bool):
        self._stream: TextIO = stream if stream is not None else open(os.devnull, "w")
        self.goes_on = goes_on

    def write(self, text: str) -> int:
        """As a stream does it."""
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            return self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except OSError as error:
            self._lost(error)
            return len(text)

    def flush(self) -> None:
        """As a stream does it."""
        try:
            self._stream.flush()
        except OSError as error:
            self._lost(error)

    def _lost(self, error: OSError) -> None:
        if error.errno in _GONE:
            with suppress(OSError, ValueError):  # so that what is in the buffer goes somewhere at the process's end
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        if not self.goes_on:
            raise error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lasting_output() -> Iterator[tuple[LastingStream, LastingStream]]:
    """In this context ``sys.stdout`` and ``sys.stderr`` are lasting ones."""
    former = sys.stdout, sys.stderr
    streams = LastingStream(sys.stdout, False), LastingStream(sys.stderr, True)
    sys.stdout, sys.stderr = streams  # type: ignore[assignment]
    try:
        yield streams
    finally:
        sys.stdout, sys.stderr = former
