"""Muon beside SGD: the kernels' update is orthogonal, the rest is SGD's, and both are saved."""

import copy
from unittest import mock

import pytest
import torch
from support_train import NoWait
from torch import nn
from torch.optim._muon import _zeropower_via_newtonschulz

from fastres.train.muon import MuonBesideSGD, as_matrix, hidden_kernels
from fastres.train.optimizer import SGDW, make_optimizer, set_lr
from fastres.train.orthogonal import COEFFICIENTS, EPS, STEPS, orthogonalised

MUON = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.5}


def network(memory_format=torch.channels_last) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3), nn.Conv2d(6, 4, 1), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(4 * 4, 2)).to(memory_format=memory_format)


def learn(model, optimizer, steps=1):
    for seed in range(steps):
        x = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def optimizer_of(model, lr_on=None) -> MuonBesideSGD:
    return make_optimizer(model, 0.1, 0.9, True, 0.01, scaled=False, muon=MUON, lr_on=lr_on)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_kernels_move_orthogonally_and_the_rest_as_by_sgd(memory_format):
    model = network(memory_format)
    twin, before = copy.deepcopy(model), copy.deepcopy(model)
    learn(model, optimizer_of(model))
    learn(twin, make_optimizer(twin, 0.1, 0.9, True, 0.01, scaled=False))
    for index, rows in ((2, 6), (3, 4)):
        old, new = before[index].weight.detach(), model[index].weight.detach()
        moved = (new - old * (1 - 0.1 * 0.5)) / 0.1
        values = torch.linalg.svdvals(as_matrix(moved, memory_format == torch.channels_last))
        assert len(values) == rows and (values > 0.3).all() and (values < 1.3).all()
    kernels = {"2.weight", "3.weight"}
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters()):
        assert torch.equal(ours, theirs) == (name not in kernels), name


def test_first_fixed_and_grouped_kernels_are_left_to_sgd():
    model = network()
    assert [k.shape[0] for k in hidden_kernels(model)] == [6, 4]
    model[2].weight.requires_grad = False
    model[3] = nn.Conv2d(6, 6, 3, groups=2)
    assert hidden_kernels(model) == []


def test_learning_rate_reaches_every_group():
    optimizer = optimizer_of(network())
    set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.025, 0.025, 0.025, 0.025])
    assert len(optimizer.param_groups[-1]["params"]) == 2
    before = copy.deepcopy(optimizer.kernels)
    set_lr(optimizer, 0.0)
    optimizer.step()
    assert all(map(torch.equal, before, optimizer.kernels))


@pytest.mark.parametrize("lr_on", [None, torch.device("cpu")], ids=["a number", "a tensor"])
def test_a_saved_state_goes_on_bit_for_bit(lr_on):
    whole = network()
    learn(whole, optimizer_of(whole, lr_on), steps=3)
    part = network()
    optimizer = optimizer_of(part, lr_on)
    learn(part, optimizer, steps=2)
    saved, rest = copy.deepcopy(optimizer.state_dict()), network()
    rest.load_state_dict(part.state_dict())
    again = optimizer_of(rest, lr_on)
    again.load_state_dict(saved)
    x = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(2))
    again.zero_grad()
    rest(x).square().mean().backward()
    again.step()
    assert all(map(torch.equal, rest.state_dict().values(), whole.state_dict().values()))
    with pytest.raises(ValueError, match="no state of Muon"):
        again.load_state_dict(saved["sgd"])


@pytest.mark.parametrize("lr_on", [None, torch.device("cpu")], ids=["a number", "a tensor"])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "neither"])
def test_moves_as_pytorchs_muon_moves_the_matrix(layout, lr_on):
    kernel = nn.Parameter(torch.randn(4, 6, 3, 3))
    if layout == "channels_last":
        kernel.data = kernel.data.contiguous(memory_format=torch.channels_last)
    elif layout == "neither":
        kernel.data = kernel.data.transpose(2, 3).contiguous().transpose(2, 3)
    matrix = nn.Parameter(as_matrix(kernel.detach(), layout == "channels_last").clone())
    theirs = torch.optim.Muon([matrix], lr=0.1, momentum=0.9, weight_decay=0.5)
    rest = SGDW([{"params": [nn.Parameter(torch.ones(1))], "decay": 0.0, "peak": 0.1}], lr=0.1)
    ours = MuonBesideSGD(rest, [kernel], **MUON, lr_on=lr_on)
    for seed in range(3):
        gradient = torch.randn(kernel.shape, generator=torch.Generator().manual_seed(seed))
        kernel.grad, matrix.grad = gradient, as_matrix(gradient, layout == "channels_last")
        theirs.param_groups[-1]["lr"] = 0.1 / (seed + 1)
        set_lr(ours, 1 / (seed + 1))
        for optimizer in (ours, theirs):
            optimizer.step()
    torch.testing.assert_close(
        as_matrix(kernel.detach(), layout == "channels_last"), matrix.detach(), rtol=0, atol=1e-6
    )


def test_rates_on_the_device_move_it_as_numbers_do_and_are_not_read():
    models, options = [network(), network()], (0.1, 0.9, True, 0.01, False)
    device = torch.device("cpu")
    optimizers = [make_optimizer(m, *options, muon=MUON, lr_on=on) for m, on in zip(models, (None, device))]
    for factor in (1.0, 0.5):
        for model, optimizer in zip(models, optimizers):
            set_lr(optimizer, factor)
            with NoWait() as waits:
                learn(model, optimizer)
            assert waits.seen == []
    assert all(isinstance(group["lr"], torch.Tensor) for group in optimizers[1].param_groups)
    for ours, theirs in zip(models[1].parameters(), models[0].parameters()):
        torch.testing.assert_close(ours, theirs)


def test_a_kernel_without_gradient_stays():
    model = network()
    before, optimizer = copy.deepcopy(model.state_dict()), optimizer_of(model)
    optimizer.step()
    assert all(map(torch.equal, before.values(), model.state_dict().values()))


def test_an_overflow_in_fp16_skips_muon_too():
    model = network()
    before = copy.deepcopy(model.state_dict())
    optimizer = make_optimizer(model, 0.1, 0.9, True, 0.01, scaled=True, muon=MUON)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model.eval()(torch.ones(1, 3, 6, 6)).sum() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(map(torch.equal, before.values(), model.state_dict().values()))


def test_matrices_of_as_many_rows_are_one_batch():
    """Each as alone, to bits: the columns that widen it are zeros; more rows than columns, nothing but zeros, NaN."""
    torch.manual_seed(0)
    shapes = (8, 40), (8, 24), (40, 8), (5, 5), (8, 24)
    matrices = [torch.randn(shape) * torch.rand(shape[0], 1) for shape in shapes] + [torch.zeros(8, 9)]
    alone = [orthogonalised([matrix])[0] for matrix in matrices]
    with mock.patch.object(torch, "baddbmm", wraps=torch.baddbmm) as products:
        together = orthogonalised(matrices)
    assert products.call_count == 2 * 5 * 2  # for 8 rows, and for 5
    assert [one.shape for one in together] == [one.shape for one in matrices]
    for ours, theirs, matrix in zip(together, alone, matrices):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02)
        expected = _zeropower_via_newtonschulz(matrix, COEFFICIENTS, STEPS, EPS)
        torch.testing.assert_close(ours, expected, rtol=0, atol=0.02)
    matrices[1][0, 0] = float("nan")
    spoiled = [not one.isfinite().all() for one in orthogonalised(matrices)]
    assert spoiled == [place == 1 for place in range(len(matrices))]
