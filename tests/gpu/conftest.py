"""Tests that need a GPU: compiled kernels, graphs, timings, sizes that an interpreter cannot take."""

import pytest
import torch

from fastres import ops


@pytest.fixture(autouse=True)
def triton():
    """Untimed Triton for the test, fixed random numbers."""
    torch.manual_seed(0)
    with ops.implementation("triton"):
        yield
