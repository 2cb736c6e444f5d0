"""The loop's profile: parts add up, and what the loop does beside them is seen."""

import json
import time

import pytest

from bench import loop
from bench.rate import make_trainer
from fastres import ops
from fastres.train import Trainer


@pytest.fixture(autouse=True)
def aten():
    """Interpreted kernels would take minutes."""
    with ops.implementation("aten"):
        yield


def test_parts_add_up(tmp_path):
    out = tmp_path / "loop.json"
    loop.main(f"--presets fast --batch-size 8 --steps 2 --epochs 2 --threads 1 --out {out}".split())
    (row,) = json.loads(out.read_text())["loop"]
    assert row["preset"] == "fast" and len(row["epochs"]) == 2
    for epoch in row["epochs"]:
        assert all(seconds > 0 for seconds in epoch["parts"].values())
        assert sum(epoch["parts"].values()) < epoch["seconds"]
    one = loop.shares(row["epochs"][:1])
    assert sum(one[name] for name in (*loop.PARTS, "rest")) == pytest.approx(1)
    assert one["outside"] == pytest.approx(one["batches"] + one["rest"])


def test_work_beside_the_parts_is_the_rest(tmp_path, monkeypatch):
    trainer = make_trainer("fast", "fp32", tmp_path, 8, 2)
    plain = loop.clocked_epoch(trainer, 0)
    step = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda self, *batch: (time.sleep(0.2), step(self, *batch)))
    slow = loop.clocked_epoch(trainer, 1)
    trainer.folder.close()
    rests = [epoch["seconds"] - sum(epoch["parts"].values()) for epoch in (plain, slow)]
    assert rests[1] >= 0.4 and rests[0] < 0.4
