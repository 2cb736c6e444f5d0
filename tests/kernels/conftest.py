"""Kernels in the interpreter touch no memory but their tensors."""

import pytest
from support_kernels import checked_addresses


@pytest.fixture(autouse=True)
def addresses():
    """Check those of all launches: a kernel that is wrong should fail its test, not end the process."""
    with checked_addresses():
        yield
