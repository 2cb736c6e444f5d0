"""SIGINT and SIGTERM become a wish that the loop grants after the current step."""

from __future__ import annotations

import signal


class StopRequest:
    """Context in which the first SIGINT or SIGTERM only sets `signum`; a second one acts as usual."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.signum: int | None = None

    def __enter__(self) -> StopRequest:
        self._former = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        self._restore()

    def _note(self, number: int, _frame) -> None:
        self.signum = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
