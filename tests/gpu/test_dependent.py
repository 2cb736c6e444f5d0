"""Kernels whose programs start before the kernel before has ended compute what they compute in turn, to the bit."""

import copy

import pytest
import torch
from support_gpu import batch, captured, descent
from support_kernels import device
from torch import Tensor, nn

from fastres import ops
from fastres.kernels.dependent import LEAST_ARCHITECTURE, programmatic
from fastres.kernels.resources import architecture
from fastres.models import create_model
from fastres.nn import fuse

pytestmark = pytest.mark.gpu

STEPS = 6  # the first walks, those that are noted, those that are made again
NETWORKS = {
    "notebook": lambda: create_model("notebook"),
    "bottlenecks": lambda: create_model("resnet50", stem="cifar", num_classes=10),
    "basic blocks": lambda: create_model("resnet20"),
    "preact": lambda: create_model("preact_resnet164"),
    "GELU": lambda: create_model("speed94"),
}


@pytest.fixture(params=NETWORKS)
def model(request) -> nn.Module:
    if architecture(device()) < LEAST_ARCHITECTURE:
        pytest.skip(f"needs sm_{LEAST_ARCHITECTURE}")
    return fuse(NETWORKS[request.param]()).to(device(), memory_format=torch.channels_last)


def trained(model: nn.Module, x: Tensor, labels: Tensor, on: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The losses of some steps of a copy, and all that it then holds."""
    one = copy.deepcopy(model)
    with programmatic(on):
        step = descent(one, x, labels)
        losses = [step() for _ in range(STEPS)]
    torch.cuda.synchronize()
    return losses, dict(one.state_dict())


@pytest.mark.parametrize("implementation", ["triton", "vendor"])
def test_steps_have_the_same_bits(model, implementation):
    x, labels = batch(64)
    with ops.implementation(implementation):
        in_turn, state = trained(model, x, labels, False)
        overlapped, other_state = trained(model, x, labels, True)
    if implementation == "triton":
        torch.testing.assert_close(overlapped, in_turn, rtol=0, atol=0)
        torch.testing.assert_close(other_state, state, rtol=0, atol=0)
    else:  # cuDNN's weight gradients may add up in another order
        torch.testing.assert_close(overlapped, in_turn, rtol=1e-2, atol=1e-2)


def test_a_graph_has_the_same_bits(model):
    x, labels = batch(64)
    expected, state = trained(model, x, labels, False)
    start = copy.deepcopy(model.state_dict())
    with programmatic(True):
        graph, loss = captured(descent(model, x, labels), model, start)
    losses = []
    for _ in range(STEPS):
        graph.replay()
        losses.append(loss.clone())
    torch.testing.assert_close(losses, expected, rtol=0, atol=0)
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
