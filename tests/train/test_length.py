"""Runs that end early, and finished runs that go on longer."""

import dataclasses

import pytest
import torch
from support_train import same_weights, tiny_trainer

from fastres.errors import FastresError
from fastres.train import trainer
from fastres.train.checkpoint import load_checkpoint


def scored(monkeypatch, accuracies):
    """Epochs have these validation accuracies."""
    real, left = trainer.evaluate, iter(accuracies)
    monkeypatch.setattr(trainer, "evaluate", lambda *a, **k: dataclasses.replace(real(*a, **k), accuracy=next(left)))


def test_a_run_ends_after_epochs_without_a_better_one(tmp_path, monkeypatch):
    said = []
    options = dict(model="resnet8", epochs=9, batch_size=48, patience=2)
    run = tiny_trainer(tmp_path, **options)
    run.say = said.append
    with monkeypatch.context() as patch:
        scored(patch, [0.3, 0.5, 0.5, 0.4, 0.2, 0.9])
        best = max(run.fit(), key=lambda row: (row["val_accuracy"], -row["val_loss"]))["epoch"]
    assert len(run.history) == best + 2 < 9 and load_checkpoint(tmp_path / "best.pt")["epoch"] == best
    assert f"no better epoch in 2: ended after step {run.step} of 18" in said[-1]
    run.folder.close()
    again = tiny_trainer(tmp_path, **options)
    again.resume()
    assert len(again.fit()) == best + 2
    again.folder.close()
    longer = tiny_trainer(tmp_path, **{**options, "patience": best + 3})
    longer.resume()
    scored(monkeypatch, [0.1] * 9)
    assert len(longer.fit()) > best + 2


@pytest.mark.parametrize("unit", ["epochs", "steps"])
def test_a_finished_run_goes_on_as_one_that_was_stopped_there(tmp_path, unit):
    """With a constant rate the longer run is, bit for bit, the one that was meant to be as long from the beginning."""
    short, long = {"epochs": (1, 3), "steps": (6, 18)}[unit]
    options = dict(model="resnet8", schedule="constant", warmup=0.0)
    whole = tiny_trainer(tmp_path / "whole", **options, **{unit: long})
    whole.fit()
    first = tiny_trainer(tmp_path / "run", **options, **{unit: short})
    first.fit()
    first.folder.close()
    more = tiny_trainer(tmp_path / "run", **options, **{unit: long})
    more.resume()
    assert more.step == 6
    more.fit()
    assert same_weights(whole.model.state_dict(), more.model.state_dict())
    assert torch.equal(more.tally.loss, whole.tally.loss)
    less = tiny_trainer(tmp_path / "less", **options, **{unit: short})
    less.folder.close()
    more.folder.close()
    shorter = tiny_trainer(tmp_path / "run", **options, **{unit: short})
    with pytest.raises(FastresError, match="has 18 steps already, more than the 6"):
        shorter.resume()
