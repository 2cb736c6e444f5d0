"""Every launch of a kernel, in one place, so that those of a walk can be noted and made again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol


class Observer(Protocol):
    """Is told of launches, see `observed_by`."""

    def launched(self, compiled: Any, grid: tuple[int, ...], arguments: list[Any]) -> None:
        """A kernel was launched.

        Args:
            compiled: what Triton compiled for these arguments; None in its interpreter.
            arguments: in the kernel's order, those that are compiled in too.
        """

    def spoiled(self, reason: str) -> None:
        """What goes on cannot be done again by the same launches."""


_observer: ContextVar[Observer | None] = ContextVar("observer", default=None)


@contextmanager
def observed_by(observer: Observer) -> Iterator[None]:
    """The observer is told of the launches inside, in this thread."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def spoil(reason: str) -> None:
    """Tell the observer, if there is one, that what goes on is of this once."""
    observer = _observer.get()
    if observer is not None:
        observer.spoiled(reason)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """``kernel[grid](*args, **options)``.

    Args:
        kernel: a function under ``triton.jit``. grid: programs along each axis.
        args: its first arguments. options: its others by name, and the compiler's, as num_warps.
    """
    compiled = kernel[grid](*args, **options)
    observer = _observer.get()
    if observer is not None:
        named = [options[name] for name in kernel.arg_names[len(args) :]]
        observer.launched(compiled, grid, [*args, *named])
