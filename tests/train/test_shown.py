"""What people read of a run: TensorBoard, curves, sample predictions, the learning-rate range test."""

import csv
import io

import numpy as np
import pytest
import torch
from PIL import Image
from support_train import tiny_config, tiny_dataset, tiny_split, tiny_trainer

from fastres.cli import main
from fastres.data import Batches
from fastres.errors import FastresError
from fastres.train import Trainer
from fastres.train.curves import fault_limit, plot_curves
from fastres.train.distributed import Onlooker
from fastres.train.events import TAGS
from fastres.train.lr_find import RangeTest, range_test, write_range_test
from fastres.train.report import FORMS
from fastres.train.samples import picture, predictions, spread


def test_tensorboard_has_groups_one_chart_hyper_parameters_and_pictures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    argv = "train --data synthetic --limit-train 32 --limit-test 16 --batch-size 16 --image-size 16 --epochs 2".split()
    argv += "--model resnet8 --device cpu --backend eager --precision fp32 --tta".split()
    assert main([*argv, "--out", str(tmp_path / "run")]) == 0
    shown = EventAccumulator(str(tmp_path / "run")).Reload()
    assert set(shown.Tags()["scalars"]) == set(TAGS.values()) and set(FORMS) - {"epoch", "step"} <= set(TAGS)
    for tag in ("loss/train", "loss/val", "accuracy/val"):
        assert [event.step for event in shown.Scalars(tag)] == [2, 4]
    assert set(shown.Tags()["images"]) == {"confusion/best", "predictions/best"}
    layout = shown.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    assert b"loss/train" in layout and b"loss/val" in layout
    plugin = shown.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"batch_size" in plugin and b"weight_decay" in plugin
    with Image.open(tmp_path / "run" / "predictions.png") as image:
        assert image.size[0] > 500
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0  # pictures again, and no row lost
    again = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [event.step for event in again.Scalars("loss/train")] == [2, 4]


@pytest.mark.parametrize(
    "lines, limit",
    [
        ([[2.3, 1.2, 0.8, 0.6, 0.5, 0.45]], None),
        ([[2.3, 0.1, 0.05, 0.04, 0.03]], None),  # the first epoch is no accident
        ([[2.3, 1.2, 900.0, 0.6, 0.5], [2.2, 1.1, 1.0, 0.9, 0.8]], 2.3 * 1.1),
        ([[2.3, 1.2, 900.0, 800.0, 0.6, 0.5, 0.4]], 2.3 * 1.1),
        ([[900.0, 1.2, 0.8, 0.6]], 1.2 * 1.1),
        ([[2.0, 500.0, 1.0]], 2.0 * 1.1),
        ([[0.1, 0.08, 0.9, 0.07, 0.06]], 0.11),
        ([[1.0]], None),
        ([[0.0, 0.0, 0.0]], None),
    ],
)
def test_bad_epochs_flatten_no_curve(lines, limit):
    assert fault_limit(lines) == (None if limit is None else pytest.approx(limit))


def test_curves_with_a_bad_epoch_are_drawn_for_the_others():
    losses = [2.3, 1.2, 1.1, 1.0, 0.9, 0.8]
    drawn = []
    for worst in (1.1, 5e8):
        history = [
            {
                "epoch": n,
                "train_loss": loss,
                "val_loss": worst if n == 3 else 1.3 * loss,
                "train_accuracy": 0.5,
                "val_accuracy": 0.5,
            }
            for n, loss in enumerate(losses, 1)
        ]
        file = io.BytesIO()
        plot_curves(history, "x", file)
        drawn.append(np.asarray(Image.open(file).convert("RGB")).astype(int))
    blue = [(np.abs(image[:, :540] - [31, 119, 180]).sum(2) < 60).any(1).sum() for image in drawn]  # rows of the line
    assert blue[1] > 0.5 * blue[0] > 50, blue


def test_samples_are_from_all_over_and_as_they_are_seen():
    assert spread(1000).tolist()[::19] == [0, 999] and spread(3).tolist() == [0, 1, 2] and len(spread(20)) == 20
    split = tiny_split(7, 2)
    batches = Batches(split, 3, (110.0,) * 3, (60.0,) * 3, train=False)

    class Taken(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.p = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return torch.tensor([[0.0, 9.0, 0.0]]).repeat(len(x), 1)

    found = predictions(Taken().eval(), batches, torch.float32)
    assert torch.equal(found.images, split.images.permute(0, 2, 3, 1)) and found.labels == split.labels.tolist()
    assert found.classes == [1] * 7 and found.shares[0] > 0.99
    drawn = picture(found, ["a $", "b" * 50, "c\x1b"], "title $x")
    assert drawn.startswith(b"\x89PNG")


def test_range_test(tmp_path):
    """The rate that is suggested is of a fall, below the one at which the loss is least, and training with it works."""
    trainer = Trainer(
        tiny_config(model="resnet8", lr=0.4), tiny_dataset(), Onlooker(tmp_path / "none"), say=lambda _: None
    )
    found = range_test(trainer, steps=50)
    assert found.rates[0] == pytest.approx(1e-6) and all(a < b for a, b in zip(found.rates, found.rates[1:]))
    assert 1e-5 < found.suggestion < found.best <= 1.01 * 10
    write_range_test(tmp_path / "new", found, "a $")
    rows = list(csv.reader((tmp_path / "new" / "lr.csv").open()))
    assert rows[0] == ["learning rate", "loss", "mean loss"] and len(rows) == 1 + len(found.rates)
    assert (tmp_path / "new" / "lr.png").read_bytes().startswith(b"\x89PNG") and not (tmp_path / "none").exists()
    rate = found.suggestion
    history = tiny_trainer(tmp_path / "run", model="resnet8", lr=rate, epochs=3, schedule="constant", warmup=0.0).fit()
    assert history[-1]["train_loss"] < history[0]["train_loss"]


def test_the_rate_of_half_the_fall():
    """Noise at rates that are too small to learn with does not count, nor what comes behind the rise."""
    random = np.random.default_rng(0)
    rates = [10 ** (-6 + 7 * n / 99) for n in range(100)]
    curve = [2.3 - 1.2 / (1 + (1e-2 / rate) ** 2) + (rate / 0.5) ** 2 for rate in rates]
    for noise in (0.0, 0.05):
        found = RangeTest(rates, [loss + noise * random.standard_normal() for loss in curve])
        assert 2e-3 < found.suggestion < 3e-2 < found.best < 0.3
    with pytest.raises(FastresError, match="falls at no learning rate"):
        _ = RangeTest(rates, [1 + n for n in range(100)]).suggestion


def test_lr_find_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastres.train.lr_find.STEPS", 12)
    limits = "--limit-train 64 --limit-test 16 --batch-size 16 --image-size 16"
    argv = f"train --data synthetic {limits} --model resnet8".split()
    argv += "--device cpu --backend eager --precision fp32 --lr-find found".split()
    assert main(argv) in (0, 2)  # of so few steps the loss may fall at no rate
    assert main([*argv, "--out", "x"]) == 2
    assert "--lr-find trains nothing: leave out --out" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
