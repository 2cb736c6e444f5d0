"""Sweeps: every setting and seed once, means and errors, what fails and what goes on."""

import json
import signal
import statistics

import pytest
from support_train import tiny_config, tiny_dataset

from fastres import data
from fastres.cli import main
from fastres.data import Split
from fastres.errors import FastresError
from fastres.train import Interrupted, Trainer
from fastres.train.sweep import Outcome, _file_name, grid, new_folder, parse_setting, summarise, sweep, table

VARIANTS = grid([("lr", [0.05, 0.02])])


def run(folder, seeds=(0, 1), variants=VARIANTS, lines=None, **changes):
    say = (lines if lines is not None else []).append
    return sweep(tiny_config(steps=2, **changes), variants, seeds, folder, lambda config: tiny_dataset(), say)


@pytest.fixture
def count_fits(monkeypatch):
    fits, fit = [], Trainer.fit
    monkeypatch.setattr(Trainer, "fit", lambda self: fits.append((self.config.lr, self.config.seed)) or fit(self))
    return fits


@pytest.mark.parametrize(
    "text, expected",
    [
        ("lr=0.1,0.2", ("lr", [0.1, 0.2])),
        ("batch-size=64, 128", ("batch_size", [64, 128])),
        ("ema=none,0.9", ("ema", [None, 0.9])),
        ("whiten=true,False", ("whiten", [True, False])),
        ("progressive=none;16:0.3,24:0.7", ("progressive", [None, "16:0.3,24:0.7"])),
    ],
)
def test_settings(text, expected):
    assert parse_setting(text) == expected


@pytest.mark.parametrize(
    "text, words",
    [
        ("lr", "must be an option"),
        ("colour=red", "must be an option"),
        ("seed=1,2", "must be an option of `fastres train` but seed"),
        ("lr=", "must be an option"),
        ("lr=0.1,x", "'x' is not of type float"),
        ("nesterov=yes", "'yes' is not of type bool"),
    ],
)
def test_bad_settings(text, words):
    with pytest.raises(FastresError, match=words):
        parse_setting(text)


def test_grid_is_every_combination():
    assert grid([]) == {"base": {}}
    both = grid([("lr", [0.1, 0.2]), ("ema", [None])])
    assert both == {"lr=0.1 ema=None": {"lr": 0.1, "ema": None}, "lr=0.2 ema=None": {"lr": 0.2, "ema": None}}


def test_finished_runs_are_not_run_again(tmp_path, count_fits):
    first = run(tmp_path)
    assert sorted(count_fits) == [(0.02, 0), (0.02, 1), (0.05, 0), (0.05, 1)]
    assert all(outcome.row["step"] == 2 for outcome in first)
    lines = []
    again = run(tmp_path, seeds=(0, 1, 2), lines=lines)
    assert count_fits[4:] == [(0.05, 2), (0.02, 2)] and again[:4] == first
    assert sum("run before" in line for line in lines) == 4
    saved = json.loads((tmp_path / "summary.json").read_text())
    assert [entry["runs"] for entry in saved["summary"]] == [3, 3] and len(saved["runs"]) == 6
    accuracies = [o.row["val_accuracy"] for o in again if o.variant == "lr=0.05"]
    mean = saved["summary"][0]["val_accuracy"]
    assert mean["mean"] == pytest.approx(statistics.mean(accuracies))
    assert mean["standard_error"] == pytest.approx(statistics.stdev(accuracies) / 3**0.5)
    assert mean["standard_deviation"] == pytest.approx(statistics.stdev(accuracies))


def test_a_failed_run_is_reported_and_tried_again(tmp_path, monkeypatch):
    fit, broken = Trainer.fit, {0.02}

    def sometimes(self):
        if self.config.lr in broken and self.config.seed == 1:
            raise RuntimeError("no luck\nat all")
        return fit(self)

    monkeypatch.setattr(Trainer, "fit", sometimes)
    lines = []
    outcomes = run(tmp_path, lines=lines)
    assert [outcome.failure for outcome in outcomes] == [None, None, None, "no luck"]
    assert lines[-1] == "4/4 lr=0.02, seed 1: failed: no luck"
    text = (tmp_path / "summary.md").read_text()
    assert "| lr=0.02 | 1 | 1 |" in text and "- lr=0.02, seed 1: no luck" in text
    broken.clear()
    assert all(outcome.failure is None for outcome in run(tmp_path))
    assert "Failed" not in (tmp_path / "summary.md").read_text()


def test_a_stopped_run_goes_on(tmp_path, monkeypatch, count_fits):
    step = Trainer.train_step

    def stopped(self, images, labels):
        step(self, images, labels)
        if self.config.seed == 1 and self.step == 1:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Trainer, "train_step", stopped)
    with pytest.raises(Interrupted, match="or with the whole sweep by the same command"):
        run(tmp_path / "a", variants={"base": {}})
    taken = []
    monkeypatch.setattr(Trainer, "train_step", lambda self, *batch: taken.append(self.step) or step(self, *batch))
    outcomes = run(tmp_path / "a", variants={"base": {}})
    assert taken == [1] and [outcome.row["step"] for outcome in outcomes] == [2, 2]
    whole = run(tmp_path / "b", seeds=[1], variants={"base": {}})
    assert outcomes[1].row["train_loss"] == whole[0].row["train_loss"]


def test_other_options_in_the_same_folder(tmp_path, count_fits):
    run(tmp_path, seeds=[0])
    with pytest.raises(FastresError, match="was run with momentum 0.9, not 0.8: choose another --out"):
        run(tmp_path, seeds=[0], momentum=0.8)
    with pytest.raises(FastresError, match="--lr -1.0 is too small"):
        run(tmp_path, variants={"base": {}, "bad": {"lr": -1.0}})
    assert len(count_fits) == 2


def test_other_data_in_the_same_folder(tmp_path, count_fits):
    first = run(tmp_path, seeds=[0])
    same = vars(tiny_dataset())
    flipped = Split(same["train"].images, same["train"].labels.flip(0))
    other = data.Dataset(**{**same, "train": flipped, "digest": ""})
    outcomes = sweep(tiny_config(steps=2), VARIANTS, [0], tmp_path, lambda config: other, lambda line: None)
    assert all("was run on other data than 'tiny': choose another --out" in outcome.failure for outcome in outcomes)
    renamed = data.Dataset(**{**same, "label": "renamed"})
    again = sweep(tiny_config(steps=2), VARIANTS, [0], tmp_path, lambda config: renamed, lambda line: None)
    assert again == first and len(count_fits) == 2


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"row": {"val_accuracy": 1.0}}', "edited"])
def test_a_damaged_or_edited_result_is_made_again(tmp_path, damage):
    variants = {"base": {}}
    (first,) = run(tmp_path, seeds=[0], variants=variants)
    result = tmp_path / "base" / "seed-0" / "result.json"
    content = json.loads(result.read_text())
    content["row"]["val_accuracy"] = 0.99
    result.write_text(json.dumps(content) if damage == "edited" else damage)
    (again,) = run(tmp_path, seeds=[0], variants=variants)
    assert again == first
    assert json.loads(result.read_text())["row"] == first.row


def test_each_setting_has_a_folder_of_its_own():
    names = ["data=a/b", "data=a_b", "data=a b", "data=a+b", "data=a%2Fb", "lr=0.1 ema=None", "data=" + "x" * 200 + "1",
             "data=" + "x" * 200 + "2", "data=\udce9"]  # fmt: skip
    folders = [_file_name(name) for name in names]
    assert len(set(folders)) == len(names) and all("/" not in name and len(name) < 200 for name in folders)
    assert _file_name("lr=0.1 ema=None") == "lr=0.1+ema=None"


def test_settings_that_cannot_be_told_apart():
    with pytest.raises(FastresError, match="--set lr is given twice: write all its values in one, lr=VALUE,VALUE"):
        grid([("lr", [0.1]), ("lr", [0.2])])
    with pytest.raises(FastresError, match="two settings are called 'data=None': rename the values"):
        grid([("data", ["None", None])])


def test_sweeps_that_start_in_one_second(tmp_path):
    folders = [new_folder(tmp_path / "sweeps" / "fast-1") for _ in range(3)]
    assert [folder.name for folder in folders] == ["fast-1", "fast-1-2", "fast-1-3"]


def test_table():
    row = dict(val_accuracy=0.5, tta_accuracy=None, val_loss=1.0, train_seconds=10.0, seconds=12.0)
    outcomes = [Outcome("a", 0, row), Outcome("a", 1, {**row, "val_accuracy": 0.52}), Outcome("b", 0, None, "why")]
    lines = table(summarise(outcomes)).splitlines()
    assert lines[2] == "| a | 2 | 0 | 51.00 ± 1.00% | 1.41 |  | 10.0 ± 0.0 | 12.0 ± 0.0 |"
    assert lines[3] == "| b | 0 | 1 |  |  |  |  |  |"


def test_command(tmp_path, capsys, monkeypatch):
    loads, load = [], data.load
    monkeypatch.setattr(data, "load", lambda *args, **kwargs: loads.append(args) or load(*args, **kwargs))
    argv = "sweep --data synthetic --limit-train 64 --limit-test 40 --batch-size 16 --device cpu --precision fp32"
    argv += f" --model resnet20 --image-size 16 --steps 1 --seeds 2 --backend eager --set lr=0.1,0.2 --out {tmp_path}"
    assert main(argv.split()) == 0
    out = capsys.readouterr().out
    assert len(loads) == 1 and "| lr=0.2 | 2 | 0 |" in out and str(tmp_path) in out
    assert main([*argv.split(), "--set", "lr=x"]) == 2
