"""Fused and eager networks in the same training loop."""

import pytest
import torch
from support_train import tiny_trainer

from fastres import ops
from fastres.errors import FastresError
from fastres.ops import cpu
from fastres.train import machine
from fastres.train.trained import load_trained


@pytest.fixture(autouse=True)
def aten():
    """Interpreted kernels would take minutes."""
    with ops.implementation("aten"):
        yield


def test_auto_is_fused_where_the_kernels_are(monkeypatch):
    monkeypatch.setattr(cpu, "unavailable", lambda: None)
    assert machine.pick_backend("auto", torch.device("cuda")) == "fused"
    assert machine.pick_backend("auto", torch.device("cpu")) == "fused"
    monkeypatch.setattr(cpu, "unavailable", lambda: "no C++ compiler")
    assert machine.pick_backend("auto", torch.device("cuda")) == "fused"
    assert machine.pick_backend("auto", torch.device("cpu")) == "eager"
    assert machine.pick_backend("fused", torch.device("cpu")) == "fused"


@pytest.mark.parametrize("model", ["resnet20", "notebook"])
def test_fused_training_follows_eager_training(tmp_path, model):
    curves = {}
    for backend in ("eager", "fused"):
        run = tiny_trainer(tmp_path / backend, backend=backend, model=model, lr=0.01)
        assert run.backend == backend and type(run.model).__module__.startswith(
            {"eager": "fastres.reference", "fused": "fastres.nn"}[backend]
        )
        curves[backend] = torch.tensor([row["train_loss"] for row in run.fit()])
    torch.testing.assert_close(curves["fused"], curves["eager"], rtol=0.05, atol=0.02)


def test_a_run_goes_on_with_the_other_backend(tmp_path):
    first = tiny_trainer(tmp_path, backend="fused")
    first.fit()
    first.folder.close()
    again = tiny_trainer(tmp_path, backend="eager", epochs=4)
    again.resume()
    assert len(again.fit()) == 4


def test_fewer_activations_are_kept_of_fused_blocks_alone(tmp_path):
    run = tiny_trainer(tmp_path / "fused", backend="fused", recompute=True)
    assert {block.recompute for block in run.model.modules() if hasattr(block, "recompute")} == {True}
    assert run.fit()
    with pytest.raises(FastresError, match="--recompute is of fused blocks: add --backend fused"):
        tiny_trainer(tmp_path / "eager", backend="eager", recompute=True)


def test_a_fused_network_is_saved_as_the_eager_one(tmp_path, monkeypatch):
    run = tiny_trainer(tmp_path, backend="fused")
    run.fit()
    x = torch.randn(4, 3, 12, 12)
    run.model.eval()
    monkeypatch.setattr("fastres.train.trained.pick_backend", lambda *_: "eager")
    plain = load_trained(tmp_path / "last.pt", torch.device("cpu")).model
    monkeypatch.setattr("fastres.train.trained.pick_backend", lambda *_: "fused")
    folded = load_trained(tmp_path / "last.pt", torch.device("cpu")).model
    with torch.no_grad():
        expected = run.model(x)
        for model in (plain, folded):
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert type(plain).__module__.startswith("fastres.reference")
    assert folded.state_dict().keys() != plain.state_dict().keys()
