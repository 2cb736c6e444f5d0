"""Progressive resolution: the text of the option, and which size a step has."""

import pytest
import torch
from support_train import tiny_trainer

from fastres.errors import FastresError
from fastres.train import TrainConfig
from fastres.train.progressive import parse_progressive, size_at


def test_stages():
    stages = parse_progressive("16:0.3,24:0.75")
    assert stages == ((16, 0.3), (24, 0.75))
    assert [size_at(stages, step, 20) for step in (0, 5, 6, 14, 15, 19)] == [16, 16, 24, 24, None, None]
    assert size_at((), 0, 20) is None


@pytest.mark.parametrize("text", ["", "16", "16:x", "16:0.5,24:0.4", "16:0", "16:1", "16:0.2:3", "a:0.5"])
def test_text_that_is_no_stages(text):
    with pytest.raises(FastresError, match="must be SIZE:SHARE pairs"):
        TrainConfig().replace(progressive=text)


def test_sizes_out_of_range(tmp_path):
    with pytest.raises(FastresError, match="4 pixels are too few, the least is 8"):
        TrainConfig().replace(progressive="4:0.5")
    with pytest.raises(FastresError, match="--progressive 16:0.5: 16 exceeds the images' 12 pixels"):
        tiny_trainer(tmp_path, progressive="16:0.5")


def test_a_run_sees_the_sizes_and_resumes_in_the_middle(tmp_path, monkeypatch):
    sizes = {}
    for name in ("whole", "part"):
        run = tiny_trainer(tmp_path / name, progressive="8:0.25,10:0.5", cutout=3, steps=8)
        if name == "part":
            assert run._size_at(0) == 8
            run.epoch, run.batch, run.step = 0, 3, 3
        learn, seen = run.learn, sizes.setdefault(name, [])
        monkeypatch.setattr(run, "learn", lambda x, y, learn=learn, seen=seen: (seen.append(x.shape[-1]), learn(x, y)))
        run.fit()
    assert sizes["whole"] == [8, 8, 10, 10, 12, 12, 12, 12] and sizes["part"] == sizes["whole"][3:]
    assert torch.isfinite(torch.tensor(run.history[-1]["train_loss"]))
