"""As many threads as this user may have: OpenMP ends the process where it cannot start one, and says little."""

from __future__ import annotations

import os
import sys
import threading

from fastres.atomic import warn_once
from fastres.errors import FastresError

OTHERS = 2  # of the progress bar and of TensorBoard


def fit_threads() -> None:
    """Let OpenMP start no more threads than there can be; to be called before PyTorch is imported, or works then too.

    Raises:
        FastresError: where there can be none beside this one.
    """
    wanted = _wanted()
    found = startable(wanted - 1 + OTHERS)
    if found >= wanted - 1 + OTHERS:
        return
    if found < OTHERS:
        raise FastresError(
            f"this user can start {found} more threads, which are too few: raise the limit of processes (ulimit -u, or "
            "pids.max of the container), or end other programs"
        )
    number = found - OTHERS + 1
    warn_once(f"this user can start {found} more threads (see ulimit -u): computing with {number} instead of {wanted}")
    os.environ["OMP_NUM_THREADS"] = str(number)
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # NumPy's, which would start its own at its import
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(max(1, number // 2))  # which starts as many in a pool of its own too


def _wanted() -> int:
    """How many threads OpenMP will compute with."""
    named = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if named.isdecimal() and int(named) > 0:
        return int(named)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def startable(most: int) -> int:
    """How many threads can run at once beside those that do, tried up to a number."""
    release = threading.Event()
    started: list[threading.Thread] = []
    try:
        for _ in range(most):
            thread = threading.Thread(target=release.wait, daemon=True)
            thread.start()
            started.append(thread)
    except RuntimeError:  # can't start new thread
        pass
    finally:
        release.set()
        for thread in started:
            thread.join()
    return len(started)
