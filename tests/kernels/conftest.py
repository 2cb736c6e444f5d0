"""Kernels in the interpreter compute bfloat16 as a GPU does and touch no memory but their tensors."""

import interpreter_bf16
import pytest
from support_kernels import checked_addresses

interpreter_bf16.install()


@pytest.fixture(autouse=True)
def addresses():
    """Check those of all launches: a kernel that is wrong should fail its test, not end the process."""
    with checked_addresses():
        yield
