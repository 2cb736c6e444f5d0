"""Weights that stay in fp32 until a CPU packs them: the bits of those that are cast before, and no copy is kept."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fastres import ops
from fastres.models import create_model
from fastres.nn import fuse
from fastres.ops import cpu
from fastres.ops.cpu import tiles

pytestmark = pytest.mark.skipif(
    cpu.unavailable() is not None or tiles.form() is None, reason="no tiles for bf16 on this CPU"
)


@pytest.fixture(autouse=True)
def compiled():
    with ops.implementation("cpp"):
        yield


def network(memory_format: torch.memory_format) -> nn.Module:
    torch.manual_seed(0)
    return fuse(create_model("resnet18", stem="cifar").train()).to(memory_format=memory_format)


def images() -> Tensor:
    return torch.randn(3, 3, 13, 12, generator=torch.Generator().manual_seed(1))


def forward(model: nn.Module) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model(images()).float().square().sum()


def gradients(model: nn.Module) -> list[Tensor]:
    forward(model).backward()
    return [p.grad for p in model.parameters()]


def test_the_bits_are_those_of_weights_that_are_cast():
    """In PyTorch's own memory format a weight is cast as it is brought into ours."""
    channels_last, plain = network(torch.channels_last), network(torch.contiguous_format)
    assert all(map(torch.equal, gradients(channels_last), gradients(plain)))


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_no_cast_is_kept_where_the_weights_lie_as_they_are_read(memory_format):
    model, kept = network(memory_format), []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        forward(model)
    own = {p.data_ptr() for p in model.parameters()}
    sizes = {
        p.numel() for p in model.parameters() if p.dim() == 4 and p.shape[1] > 128
    }  # no activation has as many values
    weights = [tensor for tensor in kept if tensor.numel() in sizes]
    assert weights and all(tensor.data_ptr() in own for tensor in weights) == (memory_format == torch.channels_last)


def test_a_weight_that_changes_before_the_backward_pass_is_named():
    model = network(torch.channels_last)
    loss = forward(model)
    with torch.no_grad():
        next(p for p in model.parameters() if p.dim() == 4).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_backward_pass_of_another_implementation_casts_them_itself():
    model = network(torch.channels_last)
    expected = gradients(copy.deepcopy(model))
    loss = forward(model)
    with ops.implementation("aten"):
        loss.backward()
    for p, grad in zip(model.parameters(), expected):
        torch.testing.assert_close(p.grad, grad, rtol=0.1, atol=0.05 * grad.abs().max().item() + 1e-6)
