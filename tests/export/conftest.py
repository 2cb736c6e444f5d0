"""These tests run plain ATen unless they say otherwise: interpreted kernels would take minutes."""

import pytest
import torch

from fastres import ops


@pytest.fixture(autouse=True)
def aten():
    """ATen for the test, fixed random numbers."""
    torch.manual_seed(0)
    with ops.implementation("aten"):
        yield
