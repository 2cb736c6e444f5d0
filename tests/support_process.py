"""Beginning of a process that a test starts."""

import interpreter_bf16
import torch


def begin() -> None:
    """What `conftest` does for the tests' own process: one thread, and Triton's interpreter repaired."""
    torch.set_num_threads(1)
    interpreter_bf16.install()


def check_interpreter(rank: int) -> None:
    """`begin`, and an error where the interpreter is still broken."""
    begin()
    assert interpreter_bf16.loops() and interpreter_bf16.rounds_to_nearest() and interpreter_bf16.multiplies()
