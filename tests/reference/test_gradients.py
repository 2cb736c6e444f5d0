"""Gradients reach every parameter, and activation checkpointing changes neither them nor the statistics."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support_nets import SMALL, assert_same, perturbed, train_step

from fastres.models import create_model
from fastres.reference.preact import preact_resnet

NAMES = ["notebook", "resnet8", "resnet18", "resnet50", "resnet20", "resnet110", "preact_resnet164"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("residual", [True, False])
def test_gradients_reach_every_parameter(name, residual):
    torch.manual_seed(0)
    model = create_model(name, residual=residual)
    F.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.tensor([0, 3, 5, 9])).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any(), parameter_name


@pytest.mark.parametrize("name", [name for name in SMALL if name != "torchvision"])
@pytest.mark.parametrize("every", [1, 2, 100])
def test_checkpointing_changes_nothing(name, every):
    torch.manual_seed(0)
    stored = perturbed(SMALL[name]()).double().train()
    recomputed = copy.deepcopy(stored)
    recomputed.checkpoint_every = every
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    results = train_step(recomputed, x)
    assert all(value == 1 for key, value in results.items() if key.endswith("num_batches_tracked"))
    assert_same(results, train_step(stored, x), 1e-12)
    recomputed.eval(), stored.eval()
    assert torch.equal(recomputed(x), stored(x))


class Saved:
    """Counts the bytes that autograd keeps for backward."""

    def __init__(self):
        self.storages = {}

    def keep(self, tensor):
        self.storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    @property
    def bytes(self):
        return sum(self.storages.values())


def test_checkpointing_keeps_a_fraction_of_the_activations():
    kept = {}
    for every in (0, 4):
        model, saved = preact_resnet(164, checkpoint_every=every), Saved()
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        with torch.autograd.graph.saved_tensors_hooks(saved.keep, lambda tensor: tensor):
            model(torch.randn(2, 3, 16, 16))
        kept[every] = saved.bytes - weights
    assert kept[4] < 0.2 * kept[0], kept


def test_resnet1001_takes_a_training_step():
    torch.manual_seed(0)
    model = create_model("preact_resnet1001", checkpoint_every=18)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 3, 5, 9])
    before = [p.detach().clone() for p in model.parameters()]
    loss = F.cross_entropy(model(x), labels)
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    assert all(p.isfinite().all() and not torch.equal(p, b) for p, b in zip(model.parameters(), before))
