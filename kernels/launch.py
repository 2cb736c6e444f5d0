"""Every launch of a kernel, in one place, so that those of a walk can be compiled ahead, noted and made again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from torch import Tensor
from triton import AsyncCompileMode
from triton.runtime import driver

from fastres.kernels.dependent import is_programmatic, launch_options
from fastres.kernels.resources import architecture


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
_ahead: ContextVar[bool] = ContextVar("ahead", default=False)


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


@contextmanager
def compiled_ahead() -> Iterator[None]:
    """Inside nothing is launched: all cores compile what would have been, and results are undefined.

    At the end all of it is compiled. What cannot be raises when it is launched.
    """
    token = _ahead.set(True)
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            with AsyncCompileMode(pool, ignore_errors=True) as mode:
                yield
            kernels = [future.result(ignore_errors=True) for future in mode.future_kernels.values()]
            list(pool.map(_launcher, filter(None, kernels)))
    finally:
        _ahead.reset(token)


def is_ahead() -> bool:
    """Whether this is inside `compiled_ahead`."""
    return _ahead.get()


def _launcher(kernel: Any) -> None:
    """Make what launches a kernel: until Triton 3.7 a compiled C function for each signature."""
    driver.active.launcher_cls(kernel.src, kernel.metadata)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """``kernel[grid](*args, **options)``.

    Args:
        kernel: a function under ``triton.jit``. grid: programs along each axis.
        args: its first arguments. options: its others by name, and the compiler's, as num_warps.
    """
    compiler = {}
    if is_programmatic():
        device = next(value.device for value in (*args, *options.values()) if isinstance(value, Tensor))
        compiler = launch_options(architecture(device))
    if _ahead.get():
        kernel.run(*args, grid=grid, warmup=True, **options, **compiler)
        return
    compiled = kernel[grid](*args, **options, **compiler)
    observer = _observer.get()
    if observer is not None:
        named = [options[name] for name in kernel.arg_names[len(args) :]]
        observer.launched(compiled, grid, [*args, *named])
