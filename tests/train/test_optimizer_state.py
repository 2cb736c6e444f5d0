"""A saved optimizer's state goes on where steps are computed otherwise: with rates on the device, or as numbers."""

import copy

import pytest
import torch
from torch import Tensor, nn

from fastres.train.optimizer import make_optimizer, set_lr
from fastres.train.optimizer_state import load_state

KINDS = {
    "sgd": {},
    "adamw": dict(kind="adamw"),
    "lamb": dict(kind="lamb"),
    "muon": dict(muon=dict(lr=0.1, momentum=0.6, weight_decay=0.0)),
}


def made(kind, lr_on):
    torch.manual_seed(0)
    convs = [nn.Conv2d(inputs, 4, 3, bias=False) for inputs in (3, 4)]
    model = nn.Sequential(convs[0], nn.BatchNorm2d(4), convs[1], nn.Flatten(), nn.Linear(16, 2))
    optimizer = make_optimizer(model, 0.1, 0.9, True, 1e-2, scaled=False, lr_on=lr_on, **KINDS[kind])
    return model, optimizer


def learn(model, optimizer, factor):
    set_lr(optimizer, factor)
    optimizer.zero_grad()
    model(torch.linspace(-1, 1, 216).sin().view(2, 3, 6, 6)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before, after", [(None, "cpu"), ("cpu", None), ("cpu", "cpu"), (None, None)])
def test_a_run_goes_on_at_the_rates_that_follow(kind, before, after):
    model, optimizer = made(kind, before)
    for factor in (1.0, 0.5):
        learn(model, optimizer, factor)
    again, other = made(kind, after)
    again.load_state_dict(model.state_dict())
    rates, ways = ([group.get(name) for group in other.param_groups] for name in ("lr", "capturable"))
    load_state(other, copy.deepcopy(optimizer.state_dict()))
    assert [group.get("capturable") for group in other.param_groups] == ways
    for group, rate in zip(other.param_groups, rates):
        assert isinstance(group["lr"], Tensor) == (after is not None)
        if after is not None:
            assert group["lr"] is rate  # which a graph reads
    for each in ((model, optimizer), (again, other)):
        learn(*each, 0.25)
    for a, b in zip(model.parameters(), again.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_another_optimizers_state_is_refused():
    _, small = made("sgd", None)
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(ValueError):
        load_state(other, small.state_dict())
