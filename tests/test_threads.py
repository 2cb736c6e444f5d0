"""Users and containers with few processes."""

import ctypes
import os
import resource
import subprocess
import sys
import threading
from functools import partial

import pytest

from fastres import threads
from fastres.errors import FastresError


def few(monkeypatch, number: int) -> None:
    """Let no more than a number of threads start."""
    start, started = threading.Thread.start, []

    def limited(thread):
        if len(started) >= number:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)


@pytest.mark.parametrize("can, computes", [(0, None), (1, None), (2, 1), (4, 3), (9, 8), (50, None)])
def test_threads_that_can_be_started(monkeypatch, can, computes, caplog):
    monkeypatch.setenv("OMP_NUM_THREADS", "9")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "9")
    monkeypatch.setitem(sys.modules, "torch", None)
    few(monkeypatch, can)
    if can < threads.OTHERS:
        with pytest.raises(FastresError, match=rf"can start {can} more threads, which are too few: raise the limit"):
            threads.fit_threads()
    else:
        threads.fit_threads()
        assert os.environ["OMP_NUM_THREADS"] == str(computes or 9)
        assert ("instead of 9" in caplog.text) == (computes is not None)


def become_a_user(limit: int) -> None:
    """A user with a limit, who reads what root may read: before exec."""
    libc = ctypes.CDLL(None)
    for capability in (24, 21):  # CAP_SYS_RESOURCE, CAP_SYS_ADMIN: those who have them have no limit
        libc.prctl(24, capability)  # PR_CAPBSET_DROP
    resource.setrlimit(resource.RLIMIT_NPROC, (limit, limit))
    os.setreuid(60000 + os.getpid() % 5000, 0)  # without another process


def run_limited(limit: int, code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=partial(become_a_user, limit),
        env={**os.environ, "OMP_NUM_THREADS": "8"},
    )  # fmt: skip


MULTIPLY = """
import sys
from fastres.cli import main
if status := main(["models"]):
    sys.exit(status)
import torch
print("computed", torch.get_num_threads(), (torch.randn(999, 999) @ torch.randn(999, 999)).isfinite().all().item())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user, whose limit counts that user's processes alone")
@pytest.mark.parametrize("limit, status", [(2, 2), (6, 0)])
def test_a_user_with_few_processes(limit, status):
    """With the limit itself, at which OpenMP would end the process."""
    if run_limited(limit, "from fastres.threads import startable; print(startable(9))").stdout == "9\n":
        pytest.skip("the kernel has no limit of processes here")
    ended = run_limited(limit, MULTIPLY)
    assert ended.returncode == status, ended.stderr
    assert ended.stderr.count("\n") == 1 and ("too few" if status else "computing with 4 instead of 8") in ended.stderr
    assert (ended.stdout.endswith(" True\n")) == (status == 0)
