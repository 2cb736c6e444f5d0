"""What a training step of a fused network leaves behind."""

import gc

import pytest
import torch

from fastres.models import create_model
from fastres.nn import fuse


def living() -> int:
    """Elements of all tensors that Python's collector knows."""
    return sum(one.numel() for one in gc.get_objects() if issubclass(type(one), torch.Tensor))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["resnet18", "notebook", "preact_resnet164"])
def test_activations_are_freed_without_the_garbage_collector(name, recompute):
    """Circles of references would keep them alive until it runs, for many steps."""
    model = fuse(create_model(name), recompute).train()

    def step() -> None:
        model(torch.randn(2, 3, 32, 32)).sum().backward()

    step()  # makes the gradients
    gc.collect()
    gc.disable()
    try:
        before = living()
        step()
        assert living() <= before
    finally:
        gc.enable()
