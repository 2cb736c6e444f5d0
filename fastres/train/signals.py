"""SIGINT and SIGTERM: before training an orderly exit, and in it a wish that the loop grants after the current step."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def terminate_orderly() -> Iterator[None]:
    """In this context SIGTERM unwinds the stack, as SIGINT does, so that open files and folders are cleaned up."""

    def leave(number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + number)

    former = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


class StopRequest:
    """Context in which the first SIGINT or SIGTERM only sets `signum`; a second one acts as usual."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.signum: int | None = None

    def __enter__(self) -> StopRequest:
        self._former = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def poll(self) -> None:
        """Called after every step; where several ranks train, that is when they agree."""

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signum = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
