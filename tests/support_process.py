"""Beginning of a process that a test starts."""

import faulthandler

import interpreter_bf16
import torch

LIMIT = 900.0  # seconds after which a process hangs; on a machine with much else to do it takes minutes to start


def begin(limit: float = LIMIT) -> None:
    """What `conftest` does for the tests' own process: one thread, and Triton's interpreter repaired.

    A process that is still there after the ``limit`` writes where each of its threads is, and ends: its test fails, and
    does not wait for it without end.
    """
    faulthandler.dump_traceback_later(limit, exit=True)
    torch.set_num_threads(1)
    interpreter_bf16.install()


def check_interpreter(rank: int) -> None:
    """`begin`, and an error where the interpreter is still broken."""
    begin()
    assert interpreter_bf16.loops() and interpreter_bf16.rounds_to_nearest() and interpreter_bf16.multiplies()
