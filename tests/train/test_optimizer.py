"""SGD with decoupled weight decay against the formulas in float64."""

import pytest
import torch
from torch import nn

from fastres.train.optimizer import make_optimizer, set_lr


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=True), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(2)).double()


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_three_steps_by_hand(nesterov, scaled):
    model = network()
    x = torch.randn(5, 3, 6, 6, dtype=torch.double)
    model(x)
    momentum, decay, rates = 0.9, 0.02, (0.1, 0.3, 0.05)
    optimizer = make_optimizer(model, 1.0, momentum, nesterov, decay, scaled)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    velocity = {name: torch.zeros_like(p) for name, p in expected.items()}
    for rate in rates:
        set_lr(optimizer, rate)
        model(x).square().sum().backward()
        for name, p in model.named_parameters():
            g, w = p.grad, expected[name]
            velocity[name] = momentum * velocity[name] + g
            shrink = rate * decay if w.ndim > 1 else 0.0
            expected[name] = w * (1 - shrink) - rate * (g + momentum * velocity[name] if nesterov else velocity[name])
        optimizer.step()
        optimizer.zero_grad()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), expected[name], rtol=1e-12, atol=1e-12)


def test_a_gradient_that_overflowed_changes_nothing():
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    optimizer = make_optimizer(model, 0.1, 0.9, True, 0.5, scaled=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.ones(1, 3)).sum() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(model.weight, before)
    assert scaler.get_scale() < 65536
