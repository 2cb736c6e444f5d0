"""Test-wide set-up: interpreted kernels where there is no GPU, GPU tests skipped there, one thread a worker.

In the interpreter kernels compute bfloat16 as a GPU does. Networks and training, in this process and in those that
tests start, run on what a user's machine would take: interpreted kernels would take minutes, so tests ask for them.
"""

import os
import signal

import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must be set before a kernel module is imported

import interpreter_bf16  # noqa: E402
import pytest  # noqa: E402

from fastres.ops import cpu  # noqa: E402

interpreter_bf16.install()
if not HAS_GPU:
    os.environ.setdefault("FASTRES_IMPL", "aten" if cpu.unavailable() else "cpp")


def pytest_collection_modifyitems(items):
    """Skip tests marked ``gpu`` on a machine that has none."""
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):  # its keywords also have the names of folders
            item.add_marker(skip)


def pytest_configure():
    """One thread a process: the workers share the cores, and the tensors are small.

    Signals mean what they mean at a terminal, also for what tests start: `nohup` and jobs in the background ignore
        some.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
