"""Levers taken away from the CPU's implementation: each really is, and comes back; what is made of the times."""

from unittest import mock

import pytest
import torch

from bench import levers
from fastres.measure import Workload
from fastres.ops import cpu, implementation
from fastres.ops.backends.cpp import Cpp
from fastres.ops.backends.protocol import Activation, Convolution, Gradient, Normalised, Shortcut
from fastres.ops.cpu import convolutions, passes, tiles

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="no C++ compiler")
TINY = Workload("notebook", 2, 32)


@pytest.fixture(autouse=True)
def compiled():
    """The compiled passes, whatever the tests' own choice is."""
    with implementation("cpp"):
        yield


def test_every_variant_trains():
    """The losses of first steps from the same weights are the same but for rounding."""
    names = levers.steps(TINY, torch.float32)
    losses = {name: levers.steps(TINY, torch.float32)[name]() for name in names}
    for name, loss in losses.items():
        torch.testing.assert_close(loss, losses["eager"], rtol=1e-4, atol=1e-4, msg=name)


def test_levers_are_taken_away_and_come_back():
    contexts = levers.levers()
    step = levers.Step(TINY, "fused", levers.CPU, torch.bfloat16)
    spies = {
        "parts": (convolutions, "_parts"),
        "conv": (tiles, "conv"),
        "weight_grad": (tiles, "weight_grad"),
        "normalise": (passes, "store_bn_add_relu"),
    }

    def called(context):
        with context():
            patches = {n: mock.patch.object(*s, side_effect=getattr(*s)) for n, s in spies.items()}
            found = {name: patch.start() for name, patch in patches.items()}
            try:
                step._run()
            finally:
                for patch in patches.values():
                    patch.stop()
        return {name: spy.call_count for name, spy in found.items()}

    every = called(contexts["all"])
    assert every["normalise"] and bool(every["conv"]) == bool(every["weight_grad"]) == tiles.takes(torch.bfloat16)
    assert called(contexts["PyTorch's weight gradients"])["weight_grad"] == 0
    for name in ("PyTorch's convolutions", "PyTorch's convolutions of whole batches"):
        without = called(contexts[name])
        assert without["conv"] == without["weight_grad"] == 0 and without["parts"]
    assert called(contexts["ATen's passes"])["normalise"] == 0
    assert called(contexts["all"]) == every


def test_no_gradient_takes_anothers_memory():
    p = Cpp()
    x, residual, w = torch.randn(2, 4, 4, 8), torch.randn(2, 4, 4, 8), torch.randn(8, 1, 1, 8)
    with mock.patch.multiple(convolutions, PART_BYTES=1, WEIGHTS_SHARE=0):
        arguments = Gradient(x), Activation(x), Convolution(w), Shortcut(residual)
        assert p.conv_backward(*arguments)[0].data_ptr() == residual.data_ptr()
        with levers._apart():
            assert p.conv_backward(*arguments)[0].data_ptr() != residual.data_ptr()
            end = Normalised(x, torch.rand(5, 8))
            assert p.bn_add_relu_backward(residual, None, end, None, True)[0].data_ptr() != residual.data_ptr()


def test_convolutions_in_every_layout():
    calls = levers.convolution_calls(TINY, torch.float32)
    assert list(calls) == ["NCHW", "NHWC", "blocked, weights packed", "NHWC, weights packed"]
    for call in calls.values():
        call()
    results = [call.args[0][3]() for call in calls.values()]
    for result in results:
        assert result.shape == results[0].shape
    torch.testing.assert_close(results[3], results[1], rtol=1e-4, atol=1e-4)


def test_the_table():
    times = {"all": {"median": 0.5}, "eager": {"median": 0.75}}
    found = {"workload": "resnet50", "steps": times, "convolutions": {"NCHW": {"median": 0.2}, "NHWC": {"median": 0.1}}}
    table = levers.table([found])
    assert "| resnet50: step, eager | 750.0 | 1.50 |" in table
    assert "| resnet50: convolutions forward, NCHW | 200.0 | 2.00 |" in table
