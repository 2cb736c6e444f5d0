"""AdamW and LAMB in the training loop, against PyTorch's own and the paper's formulas in float64."""

import copy

import pytest
import torch
from support_train import same_weights, tiny_trainer
from torch import nn

from fastres.train import preset
from fastres.train.checkpoint import load_checkpoint
from fastres.train.lamb import LAMB
from fastres.train.optimizer import make_optimizer, set_lr
from fastres.train.presets import rate_note

BETAS, DECAY = (0.8, 0.95), 0.03


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2)).double()


def learn(model, optimizer, rates=(0.1, 0.3, 0.05)):
    for seed, rate in enumerate(rates):
        set_lr(optimizer, rate)
        optimizer.zero_grad()
        x = torch.randn(5, 3, 6, 6, dtype=torch.double, generator=torch.Generator().manual_seed(seed))
        model(x).square().sum().backward()
        yield rate
        optimizer.step()


def make(model, kind, scaled=False, **options):
    return make_optimizer(model, 1.0, 0.9, True, DECAY, scaled, kind=kind, betas=BETAS, **options)


@pytest.mark.parametrize("scaled", [False, True])
def test_adamw_is_pytorchs(scaled):
    ours, theirs = network(), network()
    optimizer = make(ours, "adamw", scaled)
    for _ in learn(ours, optimizer):
        pass
    assert optimizer.taken == 3
    groups = [
        {"params": [p for p in theirs.parameters() if (p.ndim > 1) == matrix], "weight_decay": DECAY * matrix}
        for matrix in (True, False)
    ]
    plain = torch.optim.AdamW(groups, lr=1.0, betas=BETAS)
    for group in plain.param_groups:
        group["peak"] = 1.0
    for _ in learn(theirs, plain):
        pass
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-6)  # a bias before BatchNorm has rounding for a gradient


def test_lamb_by_the_papers_formulas():
    model = network()
    with torch.no_grad():
        model[3].weight.zero_()  # a length of 0 scales nothing
    optimizer = make(model, "lamb")
    expected = [p.detach().clone() for p in model.parameters()]
    means, squares = ([torch.zeros_like(p) for p in expected] for _ in range(2))
    for step, rate in enumerate(learn(model, optimizer), 1):
        for i, p in enumerate(model.parameters()):
            means[i] = BETAS[0] * means[i] + (1 - BETAS[0]) * p.grad
            squares[i] = BETAS[1] * squares[i] + (1 - BETAS[1]) * p.grad**2
            move = means[i] / (1 - BETAS[0] ** step) / ((squares[i] / (1 - BETAS[1] ** step)).sqrt() + 1e-6)
            if p.ndim > 1:
                move = move + DECAY * expected[i]
                length, stride = expected[i].norm(), move.norm()
                move = move * (length / stride if length > 0 and stride > 0 else 1.0)
            expected[i] = expected[i] - rate * move
    for p, value in zip(model.parameters(), expected):
        torch.testing.assert_close(p.detach(), value, rtol=1e-6, atol=1e-8)  # counts of steps are in fp32


def test_lamb_is_timms():
    timm = pytest.importorskip("timm.optim.lamb")
    ours, theirs = network(), network()
    for _ in learn(ours, make(ours, "lamb")):
        pass
    groups = [
        {
            "params": [p for p in theirs.parameters() if (p.ndim > 1) == matrix],
            "weight_decay": DECAY * matrix,
            "peak": 1.0,
        }
        for matrix in (True, False)
    ]
    for _ in learn(theirs, timm.Lamb(groups, lr=1.0, betas=BETAS, max_grad_norm=None)):
        pass
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_lamb_waits_for_nothing_and_takes_rates_on_the_device():
    from support_train import NoWait

    one, other = network(), network()
    for _ in learn(one, make(one, "lamb")):
        pass
    optimizer = make(other, "lamb", lr_on=torch.device("cpu"))
    for _ in learn(other, optimizer):
        with NoWait() as waits:
            optimizer.step()
            assert not waits.seen
        break
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)


def test_a_parameter_without_gradient_stays():
    moved, still = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    optimizer = LAMB([moved, still], lr=0.1, weight_decay=0.1)
    assert optimizer.step(lambda: (moved.sum().backward(), torch.tensor(3.0))[1]) == 3.0
    assert torch.equal(still, torch.ones(2, 2)) and not torch.equal(moved, torch.ones(2, 2))


@pytest.mark.parametrize("kind", ["adamw", "lamb"])
def test_a_run_goes_on_bit_for_bit(tmp_path, kind):
    options = dict(model="resnet8", optimizer=kind, lr=1e-3, layer_decay=0.7, save_steps=2)
    whole = tiny_trainer(tmp_path / "whole", **options)
    whole.fit()
    once = tiny_trainer(tmp_path / "parts", **options)
    saved, once.save = once.save, lambda: (saved(), once.step == 4 and (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        once.fit()
    once.folder.close()
    again = tiny_trainer(tmp_path / "parts", **options)
    again.resume()
    assert again.step == 4
    again.fit()
    assert same_weights(whole.model.state_dict(), again.model.state_dict())
    kept = load_checkpoint(tmp_path / "parts" / "last.pt")["optimizer"]
    assert len(kept["param_groups"]) > 10  # one and more for each of five layers


def test_rates_of_another_optimizer():
    """Those of a recipe are its own optimizer's; a line says so."""
    for kind, rates in (("adamw", (1e-3, 0.05)), ("lamb", (5e-3, 0.02))):
        config = preset("resnet50-95", optimizer=kind, batch_size=256)  # whose decay is coupled, which these have not
        assert (config.lr, config.weight_decay, config.decoupled) == (*rates, True)
        assert f"{kind} with learning rate {rates[0]:g} and weight decay {rates[1]:g}" in rate_note(
            "resnet50-95", config, ["optimizer"]
        )
    config = preset("fast", optimizer="adamw", lr=0.2)
    assert (config.lr, config.weight_decay) == (0.2, 0.05)


def test_an_overflow_in_fp16_skips_them():
    for kind in ("adamw", "lamb"):
        model = nn.Linear(3, 2)
        before = copy.deepcopy(model.state_dict())
        optimizer = make(model, kind, scaled=True)
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(model(torch.ones(1, 3)).sum() * float("inf")).backward()
        scaler.step(optimizer)
        assert same_weights(before, model.state_dict()) and optimizer.taken == 0
