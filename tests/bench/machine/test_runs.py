"""Seconds of whole runs: what a step does beside stem and blocks, and the sum."""

import json

import pytest
import torch

from bench.machine import runs
from bench.machine.chips import CHIPS, LAUNCH
from bench.machine.peers import TINY
from bench.machine.runs import Calls, listed, parts, run_record, trained
from fastres.train.arithmetic import muon_flops
from fastres.train.presets import preset

H100 = CHIPS[90]


@pytest.fixture(scope="module")
def small():
    """The parts of a preset of few channels, listed once."""
    return parts("speed94")


def test_calls_take_their_bytes_or_the_least_time():
    calls = Calls([8, 3_015_000_000], [])
    assert calls.seconds(90, H100) == pytest.approx(TINY + 3_015_000_000 / H100.bandwidth + 2 * LAUNCH)


def test_products_are_kept_apart():
    a, b = torch.zeros(4, 6), torch.zeros(6, 2)
    calls = listed(lambda: torch.addmm(torch.zeros(2), a, b).add_(1))
    assert calls.products == [(4, 2, 6)] and calls.bytes[-1] == 4 * 8 * 2


def test_the_optimizer_makes_muons_products(small):
    products = small["optimizer"].products
    operations = sum(2 * m * n * k for m, n, k in products)
    with torch.device("meta"):
        model = trained(preset("speed94"))
    assert len(products) == 15 * 3  # nine kernels, of 64, 128 and 256 outputs
    assert muon_flops(model) < operations < 1.5 * muon_flops(model)  # of columns that widen some to the widest
    weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(small["optimizer"].bytes) > 4 * 4 * weights  # gradient, momentum read and written, weight at least


def test_a_step_has_a_loss_and_a_batch(small):
    batch = 500 * 3 * 32 * 32
    assert sum(small["batch"].bytes) > batch * (1 + 4 + 4 + 4)
    assert sorted(small["head and loss"].products) == [(10, 256, 500), (500, 10, 256), (500, 256, 10)]


def test_the_whitening_layer_learns_nothing():
    assert [p.requires_grad for p in trained(preset("speed94")).conv1.parameters()] == [False, True]


def test_a_run_is_its_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "parts", lambda name: {"optimizer": Calls([8], []), "batch": Calls([], [])})
    with pytest.raises(FileNotFoundError, match="--network speed94"):
        run_record("speed94", 90, tmp_path)
    steps = {"assumed": {"Triton": 3e-3, "fused tuned": 2e-3, "fused plain": 2.5e-3, "eager plain": 9.0},
             "slower L2": {"Triton": 4e-3, "fused tuned": 3e-3, "fused plain": 3e-3, "eager plain": 9.0}}  # fmt: skip
    path = tmp_path / "machine-speed94-sm90.json"
    path.write_text(json.dumps({"batch": 500, "steps": steps}))
    run = run_record("speed94", 90, tmp_path)
    beside = TINY + LAUNCH
    assert run["steps"] == 100 * preset("speed94").epochs
    assert run["blocks"] == {"low": 2e-3, "high": 4e-3}  # of ours alone
    low, high = (run["steps"] * (one + beside) for one in (2e-3, 4e-3))
    assert run["seconds"] == {"low": pytest.approx(0.75 * low), "high": pytest.approx(1.25 * high)}
    path.write_text(json.dumps({"batch": 256, "steps": steps}))
    with pytest.raises(ValueError, match="256 images"):
        run_record("speed94", 90, tmp_path)
