"""The operations run in plain ATen and in the CPU's compiled passes; interpreted kernels have a file of their own."""

import pytest
import torch

from fastres import ops
from fastres.ops import cpu
from fastres.ops.cpu import convolutions, tiles

# modules that test an operation, whatever implements its primitives
OPERATIONS = {
    "ambient",
    "bn_relu",
    "conv_bias_act",
    "dilation",
    "gelu",
    "global_avg_pool",
    "odd_input",
    "preact",
    "residual",
    "stem",
}


def pytest_generate_tests(metafunc):
    """Each operation's tests in ATen, in C++ and in C++ over small parts of the batch; all others in ATen."""
    if metafunc.module.__name__.rpartition("test_")[2] in OPERATIONS:
        metafunc.parametrize("implementation", ["aten", "cpp", "parts"], indirect=True)


@pytest.fixture(autouse=True)
def implementation(request, monkeypatch):
    """The implementation for the test, fixed random numbers."""
    mode = getattr(request, "param", "aten")
    if mode != "aten" and (reason := cpu.unavailable()):
        pytest.skip(reason)
    if mode == "parts":
        monkeypatch.setattr(convolutions, "PART_BYTES", 8192)
        monkeypatch.setattr(convolutions, "WEIGHTS_SHARE", 0)
        monkeypatch.setattr(tiles, "form", lambda: None)  # in bf16 PyTorch's convolutions too
    torch.manual_seed(0)
    with ops.implementation("aten" if mode == "aten" else "cpp"):
        yield
