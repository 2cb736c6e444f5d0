"""The choice among implementations is timed once a shape and remembered on disk."""

import json

import pytest
import torch
from support_kernels import assert_same_bits, device
from support_nets import train_step

from fastres import ops
from fastres.nn import Bottleneck
from fastres.ops import select
from fastres.ops.timing import TimedChoices, machine_key

pytestmark = pytest.mark.gpu


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Folder of ``choices.json``, nothing chosen yet."""
    monkeypatch.setenv("FASTRES_CACHE", str(tmp_path))
    monkeypatch.delenv("FASTRES_TIMED", raising=False)
    select._timed.cache_clear()
    yield tmp_path
    select._timed.cache_clear()


def test_choices_are_timed_written_and_read_again(cache, monkeypatch):
    block = Bottleneck(64, 16).to(device())
    x = torch.randn(8, 64, 14, 14).to(device()).contiguous(memory_format=torch.channels_last)
    with ops.implementation("auto"):
        first = train_step(block, x)
        written = json.loads((cache / "choices.json").read_text())
        assert list(written) == [machine_key(torch.device(device().type, 0))]
        (entries,) = written.values()
        assert {key.split("(")[0] for key in entries} >= {"conv", "conv_backward"}
        for entry in entries.values():
            times = entry["milliseconds"]
            assert "triton" in times and entry["winner"] == min(times, key=times.get)
            assert all(time > 0 for time in times.values())
        select._timed.cache_clear()
        monkeypatch.setattr(TimedChoices, "_measure", lambda *_: pytest.fail("timed again"))
        second = train_step(block, x)
    assert_same_bits(first["logits"], second["logits"])
    assert all(entry["winner"] in ops.selection().values() for entry in entries.values())
