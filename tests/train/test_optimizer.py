"""SGD with decoupled weight decay against the formulas in float64."""

import copy

import pytest
import torch
from torch import nn

from fastres.ops import cpu
from fastres.ops.cpu import sgd as one_pass
from fastres.train.optimizer import SGDW, make_optimizer, set_lr


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


def learn(model, optimizer, steps=3):
    for seed in range(steps):
        x = torch.randn(5, 3, 6, 6, dtype=torch.double, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def twins() -> tuple[nn.Module, nn.Module]:
    model = network()
    model(torch.zeros(2, 3, 6, 6, dtype=torch.double))
    return model, copy.deepcopy(model)


def test_coupled_decay_is_pytorchs_own_of_all_parameters():
    ours, theirs = twins()
    learn(ours, make_optimizer(ours, 0.01, 0.9, True, 0.1, scaled=False, decoupled=False))
    learn(theirs, torch.optim.SGD(theirs.parameters(), 0.01, momentum=0.9, nesterov=True, weight_decay=0.1))
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_biases_have_a_rate_of_their_own():
    ours, theirs = twins()
    learn(ours, make_optimizer(ours, 0.01, 0.9, True, 0.0, scaled=False, bias_lr=8.0), steps=1)
    learn(theirs, make_optimizer(theirs, 0.01, 0.9, True, 0.0, scaled=False), steps=1)
    start = dict(twins()[0].named_parameters())
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
        factor = 8 if name.endswith("bias") else 1
        torch.testing.assert_close(a - start[name], factor * (b - start[name]), rtol=1e-9, atol=1e-12)


def test_rates_on_a_device_are_the_same_rates():
    ours, theirs = twins()
    options = dict(scaled=False, bias_lr=2.0)
    on_device = make_optimizer(ours, 0.01, 0.9, True, 0.1, **options, lr_on=torch.device("cpu"))
    on_host = make_optimizer(theirs, 0.01, 0.9, True, 0.1, **options)
    for factor in (1.0, 0.25):
        for model, optimizer in ((ours, on_device), (theirs, on_host)):
            set_lr(optimizer, factor)
            learn(model, optimizer, steps=1)
    rates = [group["lr"] for group in on_device.param_groups]
    assert all(isinstance(rate, torch.Tensor) for rate in rates)
    assert [rate.item() for rate in rates] == pytest.approx([group["lr"] for group in on_host.param_groups])
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


SHAPES = [(5, 3, 3, 3), (64, 40, 1, 1), (7,), (33, 65), (1,), (300, 17, 3, 3), (2, 1, 5, 5), (0, 4)]
FORMATS = [torch.contiguous_format, torch.channels_last]


def parameters(memory_format: torch.memory_format, dtype: torch.dtype) -> list[nn.Parameter]:
    """With gradients, all values the same in each format and dtype."""
    generator, made = torch.Generator().manual_seed(0), []
    for shape in SHAPES:
        pair = [torch.randn(shape, generator=generator).to(dtype) for _ in range(2)]
        weight, grad = (one.to(memory_format=memory_format) if one.dim() == 4 else one for one in pair)
        made.append(nn.Parameter(weight))
        made[-1].grad = grad
    return made


def moved(optimizer, steps: int = 3) -> list[torch.Tensor]:
    (group, *_), held = optimizer.param_groups, []
    for number in range(steps):
        optimizer.step()
        held = [p.detach().clone() for p in group["params"]]
        for p in group["params"]:
            p.grad = p.grad * (0.5 + number)
    return held


@pytest.mark.skipif(cpu.unavailable() is not None, reason="no C++ compiler")
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("momentum, nesterov", [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize("decay, coupled", [(0.0, 0.0), (0.3, 0.0), (0.0, 0.3)])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_step_in_one_pass_against_fp64(memory_format, momentum, nesterov, decay, coupled, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    options = {"lr": 0.1, "momentum": momentum, "nesterov": nesterov}
    asked, step = [], one_pass.step
    monkeypatch.setattr(one_pass, "step", lambda *a: asked.append(len(a[0])) or step(*a))

    def steps(dtype):
        group = {"params": parameters(memory_format, dtype), "decay": decay, "weight_decay": coupled}
        return moved(SGDW([group], **options))

    ours, exact = steps(torch.float32), steps(torch.float64)
    assert asked == [len(SHAPES)] * 3  # and none of fp64
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(cpu.unavailable() is not None, reason="no C++ compiler")
@pytest.mark.parametrize("momentum, nesterov", [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize("decay, coupled", [(0.0, 0.0), (0.3, 0.0), (0.0, 0.3)])
def test_a_step_in_one_pass_has_the_bits_of_pytorchs_fused_step(momentum, nesterov, decay, coupled, monkeypatch):
    """But for what its vectors leave over."""
    ends = []
    for takes in (one_pass.takes, lambda *_: False):
        monkeypatch.setattr(one_pass, "takes", takes)
        group = {"params": parameters(torch.channels_last, torch.float32), "decay": decay, "weight_decay": coupled}
        ends.append(moved(SGDW([group], lr=0.1, momentum=momentum, nesterov=nesterov, fused=True)))
    whole = [pair for pair in zip(*ends) if pair[0].numel() % 16 == 0]
    assert len(whole) > 1 and all(torch.equal(*pair) for pair in whole)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_a_gradient_in_another_format_is_of_the_same_weights(memory_format):
    """PyTorch's fused step on a CPU would give a weight the gradient of another."""
    ends = []
    for other in (False, True):
        params = parameters(memory_format, torch.float32)
        if other:
            (apart,) = (one for one in FORMATS if one != memory_format)
            params[5].grad = params[5].grad.contiguous(memory_format=apart)
        ends.append(moved(SGDW([{"params": params, "decay": 0.1}], lr=0.1, momentum=0.9, fused=True)))
    for a, b in zip(*ends):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(cpu.unavailable() is not None, reason="no C++ compiler")
@pytest.mark.parametrize("case", ["gradient in another format", "half precision", "a gradient scaler", "a subclass"])
def test_what_the_pass_does_not_take_is_pytorchs(case, monkeypatch):
    monkeypatch.setattr(one_pass, "step", lambda *a: pytest.fail("it was taken"))
    params = parameters(torch.channels_last, torch.bfloat16 if case == "half precision" else torch.float32)
    if case == "gradient in another format":
        params[0].grad = params[0].grad.contiguous()
    if case == "a subclass":
        params[0] = nn.Parameter(params[0].detach().as_subclass(type("Other", (torch.Tensor,), {})))
        params[0].grad = torch.ones_like(params[0])
    optimizer = SGDW([{"params": params, "decay": 0.1}], lr=0.1, momentum=0.9)
    if case == "a gradient scaler":
        optimizer = SGDW([{"params": params, "decay": 0.1}], lr=0.1, momentum=0.9, fused=True)
        optimizer.found_inf = torch.zeros(())
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert any(not torch.equal(p, old) for p, old in zip(params, before))


@pytest.mark.skipif(cpu.unavailable() is not None, reason="no C++ compiler")
def test_a_step_in_one_pass_is_seen_by_autograd_and_goes_on_from_its_state():
    params = parameters(torch.channels_last, torch.float32)
    optimizer = SGDW([{"params": params, "decay": 0.1}], lr=0.1, momentum=0.9)
    loss = params[3].square().sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    twins = copy.deepcopy(params)
    other = SGDW([{"params": twins, "decay": 0.1}], lr=0.1, momentum=0.9)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, twin in zip(params, twins):
        twin.grad = p.grad.clone()
    assert all(map(torch.equal, moved(optimizer), moved(other)))
