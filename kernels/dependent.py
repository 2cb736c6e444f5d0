"""Programmatic dependent launch: a kernel's programs start while the last ones of the kernel before it still run.

On GPUs from sm_90 on a launch can say that its kernel waits for the kernel before it by itself (CUDA C++ Programming
Guide, "Programmatic Dependent Launch and Synchronization"). Then the GPU starts its programs as soon as all of that
kernel's have started and there is room, and what a launch costs is hidden behind them. It is off: no GPU has run it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from triton import knobs
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

ENVIRONMENT = "FASTRES_PDL"  # 1: on
LEAST_ARCHITECTURE = 90

_told: bool | None = None  # of all threads: backward has its own


def await_inputs(_semantic: Any = None) -> None:
    """The first statement of a kernel: the kernels before it have ended, and what they wrote is there.

    Without `programmatic` it compiles to nothing. With it every program waits here, so a kernel ends after all before
    it, and none reads or overwrites too early. Before it waits, it lets the next kernel's programs start.
    """
    if _semantic is not None and getattr(_semantic.builder.options, "launch_pdl", False):
        gdc_launch_dependents(_semantic=_semantic)
        gdc_wait(_semantic=_semantic)


await_inputs.__triton_builtin__ = True  # type: ignore[attr-defined]  # the compiler calls it with ``_semantic``


@contextmanager
def programmatic(on: bool | None) -> Iterator[None]:
    """Kernels are launched so inside, in all threads, or are not; None: as outside."""
    global _told
    before = _told
    _told = before if on is None else on
    try:
        yield
    finally:
        _told = before


def is_programmatic() -> bool:
    """Whether kernels are launched so where the GPU can: by `programmatic`, or else by ``FASTRES_PDL=1``.

    Raises:
        ValueError: where ``FASTRES_PDL`` is neither 0 nor 1.
    """
    if _told is not None:
        return _told
    value = os.environ.get(ENVIRONMENT, "0")
    if value not in ("0", "1"):
        raise ValueError(f"{ENVIRONMENT}={value}: choose 0 or 1")
    return value == "1"


def launch_options(architecture: int) -> dict[str, bool]:
    """What compiler and launcher are told beside a kernel's own options where `is_programmatic`.

    Nothing, where kernels are interpreted or the compute capability, as 90, is not enough.
    """
    can = architecture >= LEAST_ARCHITECTURE and not knobs.runtime.interpret
    return {"launch_pdl": True} if can else {}
