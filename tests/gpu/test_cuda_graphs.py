"""A whole training step in a CUDA graph, captured by hand and by ``torch.compile``, equals the step without one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support_gpu import batch, captured, descent
from support_kernels import device
from torch import nn

from fastres.nn import fuse
from fastres.reference.cifar import CifarResNet
from fastres.reference.notebook import NotebookResNet
from fastres.reference.preact import PreActResNet

pytestmark = pytest.mark.gpu

STEPS = 3
NETWORKS = {
    "cifar": lambda: CifarResNet(14, width=16),
    "notebook": NotebookResNet,
    "preact": lambda: PreActResNet(11),
}


@pytest.fixture(params=NETWORKS)
def model(request) -> nn.Module:
    return fuse(NETWORKS[request.param]()).to(device())


@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "bf16"])
def test_a_captured_step_equals_the_eager_one(model, amp):
    x, labels = batch(32)
    plain, start = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    graph, loss = captured(descent(model, x, labels, amp), model, start)
    losses, expected, uncaptured = [], [], descent(plain, x, labels, amp)
    for _ in range(STEPS):
        graph.replay()
        losses.append(loss.clone())
        expected.append(uncaptured())
    assert len(set(map(float, expected))) == STEPS
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(dict(model.state_dict()), dict(plain.state_dict()), rtol=1e-2, atol=1e-3)


def test_reduce_overhead_equals_no_compilation(model):
    x, labels = batch(32)
    plain = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    losses = {"compiled": [], "plain": []}
    for _ in range(2 * STEPS):  # the first ones warm up and record
        for name, call, module in (("compiled", compiled, model), ("plain", plain, plain)):
            torch.compiler.cudagraph_mark_step_begin()
            loss = F.cross_entropy(call(x), labels)
            module.zero_grad(set_to_none=True)
            loss.backward()
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.sub_(parameter.grad, alpha=0.01)
            losses[name].append(loss.item())
    torch.testing.assert_close(losses["compiled"], losses["plain"], rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(dict(model.named_buffers()), dict(plain.named_buffers()), rtol=1e-2, atol=1e-2)
