"""The hook of a run, and the examples that log through it, with stand-ins where W&B and MLflow are not installed."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from support_train import tiny_config, tiny_dataset, tiny_trainer

from fastres.cli import main
from fastres.errors import FastresError
from fastres.train import Trainer
from fastres.train.callbacks import load_callback
from fastres.train.run_folder import RunFolder

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
QUICK = dict(model="resnet8", batch_size=48)


def run_with(folder, *callbacks, resume=False, **changes) -> Trainer:
    run = Trainer(
        tiny_config(**{**QUICK, **changes}), tiny_dataset(), RunFolder(folder, resume), said.append, callbacks=callbacks
    )
    if resume:
        run.resume()
    run.fit()
    run.folder.close()
    return run


said: list[str] = []


def test_it_hears_of_every_epoch_when_all_is_saved(tmp_path):
    heard = []

    def hear(trainer, row):
        assert (
            trainer.folder.last.exists()
            and (trainer.folder.path / "metrics.jsonl").read_text().count("\n") == row["epoch"]
        )
        heard.append(row)

    run = run_with(tmp_path, hear)
    assert heard == run.history and len(heard) == 2
    run_with(tmp_path, hear, resume=True, epochs=3)
    assert [row["epoch"] for row in heard] == [1, 2, 3]


def test_one_that_fails_ends_no_run(tmp_path):
    def fail(trainer, row):
        row.clear()
        raise RuntimeError("no network\nmore")

    said.clear()
    run = run_with(tmp_path, fail)
    assert run.step == 4 and run.history[0]["epoch"] == 1
    assert [line for line in said if "warning" in line] == [
        f"warning: callback fail failed in epoch {n} (no network): going on" for n in (1, 2)
    ]


def test_the_command_line_loads_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "hook_of_a_test.py").write_text(
        "def hear(trainer, row):\n    print('heard', row['epoch'], trainer.step)\n"
    )
    monkeypatch.chdir(tmp_path)
    argv = "train --data synthetic --limit-train 32 --limit-test 16 --batch-size 16 --image-size 16 --epochs 1".split()
    argv += "--model resnet8 --device cpu --backend eager --precision fp32 --out run".split()
    argv += ["--callback", "hook_of_a_test.py:hear", "--callback", "hook_of_a_test:hear"]
    assert main(argv) == 0
    assert capsys.readouterr().out.count("heard 1 2") == 2


@pytest.mark.parametrize(
    "text, words",
    [
        ("log", "must be FILE.py:FUNCTION or package.module:FUNCTION"),
        ("none.py:log", "no file none.py"),
        ("no.such.module:log", r"cannot be loaded \(No module named 'no'\)"),
        ("os:nothing", r"cannot be loaded \(module 'os' has no attribute 'nothing'\)"),
        ("os:sep", "is no function"),
    ],
)
def test_what_is_no_callback(text, words):
    with pytest.raises(FastresError, match=words):
        load_callback(text)


class Stand(ModuleType):
    """A module whose functions note how they are called."""

    def __init__(self, name):
        super().__init__(name)
        self.calls = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def called(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            return [] if name == "search_runs" else SimpleNamespace(log=self.log_row)

        return called


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_examples(tmp_path, monkeypatch, name):
    installed = importlib.util.find_spec(name) is not None
    stand = Stand(name)
    if installed:
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    else:
        monkeypatch.setitem(sys.modules, name, stand)
    log = load_callback(f"{EXAMPLES / f'log_to_{name}.py'}:log")
    said.clear()
    run = run_with(tmp_path / "run", log)
    assert not [line for line in said if "warning" in line]
    if installed:
        assert (
            list((tmp_path / "run" / "wandb").glob("offline-run-*"))
            if name == "wandb"
            else (tmp_path / "mlflow.db").exists()
        )
        return
    begun = {"wandb": "init", "mlflow": "start_run"}[name]
    starts = [kwargs for function, _, kwargs in stand.calls if function == begun]
    assert len(starts) == 1 and run.run in str(starts[0])
    logged = [
        (args[0], kwargs["step"]) for function, args, kwargs in stand.calls if function in ("log_row", "log_metrics")
    ]
    assert [step for _, step in logged] == [2, 4] and [row["val_loss"] for row, _ in logged] == [
        row["val_loss"] for row in run.history
    ]


def test_a_silent_trainer_has_none(tmp_path):
    assert tiny_trainer(tmp_path).callbacks == ()
