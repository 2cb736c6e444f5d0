"""Signals that ask a run to end: before training an orderly exit, in it a wish that the loop grants after a step."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# a terminal's Ctrl-C; kill, and what batch systems send before they take a machine away; a closed terminal; what a job
# asks its batch system to send; the limit of processor time
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")


class Interrupted(Exception):
    """A signal ended the run after its state was saved, or a second one at once."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


def _ends() -> list[signal.Signals]:
    """Signals that end a process, but one that ``nohup`` has told it to ignore."""
    known = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    return [number for number in known if number.name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN]


@contextmanager
def terminate_orderly() -> Iterator[None]:
    """In this context the signals unwind the stack, as SIGINT does anyway, so that open files and folders are cleaned
    up.
    """

    def leave(number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + number)

    former = {number: signal.signal(number, leave) for number in _ends() if number != signal.SIGINT}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


class StopRequest:
    """Context in which the first of the signals only sets `signum`, and a second one calls ``at_once``.

    Args:
        at_once: called with the second signal's number, between any two lines of Python; may raise.
    """

    def __init__(self, at_once: Callable[[int], None] = lambda number: None):
        self.signum: int | None = None
        self.save = False  # whether the time for a checkpoint has come
        self._at_once = at_once

    def __enter__(self) -> StopRequest:
        self._former = {number: signal.signal(number, self._note) for number in _ends()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def poll(self, save: bool = False) -> None:
        """Called after every step; where several ranks train, that is when they agree.

        Args:
            save: whether this process thinks that the time for a checkpoint has come.
        """
        self.save = save

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.signum is not None:
            self._at_once(number)
        self.signum = number
