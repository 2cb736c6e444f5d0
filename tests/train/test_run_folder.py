"""A run's folder: only its own files are touched, and what lies there is of one run or refused."""

import dataclasses
import json
import os
import shutil

import pytest
import torch
from support_train import tiny_config, tiny_dataset, tiny_trainer

from fastres.errors import FastresError
from fastres.train import Interrupted, Trainer, trainer
from fastres.train.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from fastres.train.facts import run_facts
from fastres.train.identity import checksum
from fastres.train.run_folder import RunFolder, read_config, saved_config

QUICK = dict(model="resnet8", steps=2, batch_size=48)


def run_in(folder, **changes) -> Trainer:
    """A whole run, with its ``config.json``."""
    run = tiny_trainer(folder, **{**QUICK, **changes})
    run.folder.write_config(run.config, run_facts(run))
    run.fit()
    run.folder.close()
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "whole"
    run_in(folder)
    return folder


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def resumed(folder, said=None, **changes) -> Trainer:
    again = tiny_trainer(folder, **{**QUICK, **changes})
    again.say = ([] if said is None else said).append
    try:
        assert again.folder.begun()
        again.resume()
    finally:
        again.folder.close()
    return again


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "notes.txt", ".notes.tmp", ".last.pt.old.tmp"])
def test_a_folder_of_somebodys_files_is_left_alone(tmp_path, name):
    (tmp_path / name).write_text('{"mine": 1}\n')
    for resume in (False, True):
        with pytest.raises(FastresError, match=f"holds '{name}', which is no run's: choose an empty folder"):
            RunFolder(tmp_path, resume=resume)
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_text() == '{"mine": 1}\n'


def test_only_own_temporary_files_are_removed(run):
    for name in (".last.pt.abcd_123.tmp", ".notes.txt.abcd_123.tmp", ".mine.tmp"):
        (run / name).touch()
    os.symlink("elsewhere", run / ".best.pt.abcd_123.tmp")
    resumed(run)
    left = {file.name for file in run.iterdir() if file.name.endswith(".tmp")}
    assert left == {".notes.txt.abcd_123.tmp", ".mine.tmp", ".best.pt.abcd_123.tmp"}


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "folder"])
def test_a_lock_that_is_no_plain_file(run, tmp_path, kind):
    lock, mine = run / ".lock", tmp_path / "mine"
    mine.write_text("precious")
    lock.unlink(missing_ok=True)
    {"link": lambda: lock.symlink_to(mine), "dangling link": lambda: lock.symlink_to(tmp_path / "none"),
     "pipe": lambda: os.mkfifo(lock), "folder": lock.mkdir}[kind]()  # fmt: skip
    with pytest.raises(FastresError, match=r"\.lock is not a plain file: remove it"):
        RunFolder(run, resume=True)
    assert mine.read_text() == "precious" and not (tmp_path / "none").exists()


def test_a_lock_is_not_truncated(run):
    (run / ".lock").write_text("kept")
    resumed(run)
    assert (run / ".lock").read_text() == "kept"


@pytest.mark.parametrize("rest", ["best.pt", "metrics.jsonl"])
@pytest.mark.parametrize("how", ["missing", "dangling"])
def test_a_run_without_its_checkpoint_does_not_start_again(run, rest, how):
    for name in {"last.pt", "previous.pt", "best.pt", "metrics.jsonl"} - {rest}:
        (run / name).unlink(missing_ok=True)
    if how == "dangling":
        (run / "last.pt").symlink_to("nowhere")
    words = "leads nowhere" if how == "dangling" else f"is missing beside {rest}"
    with pytest.raises(FastresError, match=f"last.pt {words}: put it back, or start a new run"):
        RunFolder(run, resume=True).begun()


def test_a_checkpoint_of_another_run(run, tmp_path):
    run_in(tmp_path / "other")
    for name in ("last.pt", "best.pt"):
        kept = (run / name).read_bytes()
        shutil.copy(tmp_path / "other" / name, run / name)
        with pytest.raises(FastresError, match=f"{name} is of another run than"):
            resumed(run)
        (run / name).write_bytes(kept)
    resumed(run)


def test_other_options_beside_a_checkpoint(run):
    content = json.loads((run / "config.json").read_text())
    content["options"]["lr"] = 0.07
    (run / "config.json").write_text(json.dumps(content))
    with pytest.raises(FastresError, match="config.json is damaged"):
        saved_config(run)
    del content["checksum"]
    (run / "config.json").write_text(json.dumps({"checksum": checksum(content), **content}))
    with pytest.raises(FastresError, match="was trained with lr 0.05, but config.json beside it says 0.07"):
        resumed(run)


def test_the_checkpoint_before_the_last(tmp_path):
    whole = run_in(tmp_path / "whole", steps=6)
    run = tmp_path / "whole"
    assert load_checkpoint(run / "previous.pt")["step"] == 4
    for damage in (b"damaged", None):
        (run / "last.pt").unlink()
        if damage:
            (run / "last.pt").write_bytes(damage)
        said = []
        again = resumed(run, said, steps=6)
        assert again.step == 4
        assert len(said) == 1 and "going on from" in said[0] and "previous.pt, the one before it, at step 4" in said[0]
        folder = shutil.copytree(run, tmp_path / f"copy-{damage}")
        more = tiny_trainer(folder, **{**QUICK, "steps": 6})
        more.say = said.append
        more.resume()
        assert more.fit()[-1]["train_loss"] == whole.history[-1]["train_loss"]
        more.folder.close()


SCORES = {1: 0.5, 2: 0.9, 3: 0.4, 4: 0.6}  # of epochs


def scored(monkeypatch) -> None:
    """Every epoch's validation accuracy is that of `SCORES`."""
    real = trainer.evaluate

    def evaluate(*args, **kwargs):
        return dataclasses.replace(real(*args, **kwargs), accuracy=next(accuracies))

    accuracies = iter(SCORES.values())
    monkeypatch.setattr(trainer, "evaluate", evaluate)


@pytest.mark.parametrize("damage", ["damaged", "missing"])
@pytest.mark.parametrize(
    "epochs, holds, words",
    [
        (2, 2, None),  # the best epoch is the last one
        (3, 2, "made again of previous.pt, epoch 2"),
        (4, 4, "the weights of epoch 2 (validation accuracy 90.00%), the best one, are lost: it now holds epoch 4 "),
    ],
)
def test_a_best_checkpoint_that_is_gone(tmp_path, monkeypatch, epochs, holds, words, damage):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        scored(patch)
        whole = run_in(folder, steps=2 * epochs)
    kept = load_checkpoint(folder / "best.pt")
    assert kept["epoch"] == 2
    (folder / "best.pt").write_bytes(b"damaged") if damage == "damaged" else (folder / "best.pt").unlink()
    said = []
    again = resumed(folder, said, steps=2 * epochs)
    found = load_checkpoint(folder / "best.pt")
    assert found["epoch"] == holds == again.best["epoch"] and found["step"] == 2 * holds and found.keys() == kept.keys()
    if holds == 2:
        assert all(torch.equal(found["weights"][name], kept["weights"][name]) for name in kept["weights"])
    else:
        assert torch.equal(found["weights"]["fc.weight"], whole.model.state_dict()["fc.weight"])
    fault = f"best.pt is {damage}"
    if words is not None:
        assert len(said) == 1 and words in said[0] and fault in said[0]
    else:
        assert len(said) == (damage == "damaged") and all(fault in line for line in said)


def test_a_best_checkpoint_that_nothing_replaces(tmp_path, monkeypatch):
    """In mid-epoch no whole epoch's weights may be left: the next one's are then saved, however good."""
    with monkeypatch.context() as patch:
        scored(patch)
        run_in(tmp_path / "run", steps=4)
    content = load_checkpoint(tmp_path / "run" / "last.pt")
    save_checkpoint(
        tmp_path / "run" / "last.pt", {**content, "step": 3, "epoch": 1, "batch": 1, "history": content["history"][:1]}
    )
    for name in ("best.pt", "previous.pt"):
        (tmp_path / "run" / name).unlink()
    said = []
    more = tiny_trainer(tmp_path / "run", **{**QUICK, "steps": 4})
    more.say = said.append
    more.resume()
    assert "the next epoch will be saved there" in said[0] and more.best is None
    monkeypatch.setattr(
        trainer, "evaluate", lambda *_: type("S", (), {"loss": 9.0, "accuracy": 0.0, "tta_accuracy": None})
    )
    more.fit()
    more.folder.close()
    assert load_checkpoint(tmp_path / "run" / "best.pt")["epoch"] == 2


def test_a_file_system_without_hard_links_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    def without(*_args):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", without)
    run_in(tmp_path / "run", steps=4)
    assert load_checkpoint(tmp_path / "run" / "previous.pt")["step"] == 2


WRONG = {
    "step": "6", "epoch": -1, "history": [{"epoch": 1}], "classes": ["a", "b\x1b[2J"], "mean": [1.0, float("nan"), 1.0],
    "std": [1.0, 0.0, 1.0], "options": [], "weights": {"a": 1}, "tally": [1, 2, 3, 4], "average": 3, "optimizer": None,
    "image_size": 2.5, "model": 5, "batch": True, "seconds": "x", "model_options": {1: 2},
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_whole_checkpoint_with_a_wrong_value(run, name):
    from fastres.train.trained import load_trained

    content = load_checkpoint(run / "last.pt")
    save_checkpoint(run / "last.pt", {**content, name: WRONG[name]})
    with pytest.raises(CheckpointError, match=f"has no right value of '{name}', so no run can go on from it"):
        resumed(run)
    if name not in ("step", "history", "tally", "optimizer", "batch", "seconds"):
        with pytest.raises(CheckpointError) as stopped:
            load_trained(run / "last.pt", torch.device("cpu"))
        assert "\n" not in str(stopped.value)


@pytest.mark.parametrize("state", [{"state": {}, "param_groups": []}, {"a": 1}, {"state": 1, "param_groups": 2}])
def test_another_optimizers_state(run, state):
    content = load_checkpoint(run / "last.pt")
    save_checkpoint(run / "last.pt", {**content, "optimizer": state})
    with pytest.raises(CheckpointError, match="has another optimizer's state"):
        resumed(run)


def test_folders_of_one_second(tmp_path):
    folders = [RunFolder.new(tmp_path / "runs" / "resnet8-1") for _ in range(3)]
    assert [folder.path.name for folder in folders] == ["resnet8-1", "resnet8-1-2", "resnet8-1-3"]
    for folder in folders:
        folder.close()
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize("number", [38, 95, 22, 37])  # ENOSYS, EOPNOTSUPP, EINVAL, ENOLCK
def test_a_file_system_without_locks_or_flushes(tmp_path, monkeypatch, number, caplog):
    def lacking(*_args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", lacking)
    monkeypatch.setattr("os.fsync", lacking)
    run_in(tmp_path / "run")
    warnings = [record.getMessage() for record in caplog.records]
    assert sum("has no locks" in line for line in warnings) == 1
    assert sum("cannot flush files" in line for line in warnings) == 1


def test_the_machines_choices_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("fastres.train.machine.has_fast_bf16", lambda device: True)
    monkeypatch.setattr("fastres.ops.cpu.unavailable", lambda: "no compiler")
    run_in(tmp_path / "run", precision="auto", backend="auto")
    config = saved_config(tmp_path / "run")
    assert (config.precision, config.backend) == ("bf16", "eager")
    assert load_checkpoint(tmp_path / "run" / "last.pt")["options"]["precision"] == "bf16"
    assert read_config(tmp_path / "run")["dtype"] == "bfloat16"


def test_checkpoints_within_an_epoch(tmp_path, monkeypatch):
    options = dict(model="resnet8", batch_size=16, steps=12)
    whole = tiny_trainer(tmp_path / "whole", **options)
    whole.fit()
    part = tiny_trainer(tmp_path / "part", **options, save_steps=4)
    step, saved = part.train_step, []

    def die_at_ten(images, labels):
        if part.step == 10:
            raise KeyboardInterrupt
        step(images, labels)
        if part.folder.last.exists():
            saved.append(load_checkpoint(part.folder.last)["step"])

    monkeypatch.setattr(part, "train_step", die_at_ten)
    with pytest.raises(KeyboardInterrupt):
        part.fit()
    assert sorted(set(saved)) == [4, 6, 8]
    part.folder.close()
    rest = tiny_trainer(tmp_path / "part", **options, save_steps=4)
    rest.resume()
    assert (rest.epoch, rest.batch, rest.step) == (1, 2, 8)
    rest.fit()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, rest.model.state_dict()[name])
    assert rest.history[-1]["train_loss"] == whole.history[-1]["train_loss"]
    assert rest.train_seconds > 0


def test_checkpoints_by_the_clock(tmp_path, monkeypatch):
    run = tiny_trainer(tmp_path, model="resnet8", batch_size=16, epochs=1, save_minutes=1.0)
    now, save, saves = [0.0], run.save, []
    monkeypatch.setattr(trainer.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(run, "save", lambda: saves.append(run.step) or save())
    step = run.train_step

    def slow(images, labels):
        step(images, labels)
        now[0] += 25.0

    monkeypatch.setattr(run, "train_step", slow)
    run.fit()
    assert saves == [3, 6]  # after 75 s, and at the epoch's end


def test_a_second_signal_ends_at_once_and_says_what_is_saved(tmp_path, monkeypatch):
    import signal

    run = tiny_trainer(tmp_path, model="resnet8", batch_size=16, save_steps=2)

    def twice(batches):
        if run.step == 3:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
        return update(batches)

    update = run.lr_factor
    monkeypatch.setattr(run, "lr_factor", twice)
    with pytest.raises(
        Interrupted, match=r"ended at once by SIGINT in step 4, the second signal; .*last.pt is of step 2"
    ):
        run.fit()
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 2


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_every_signal_that_ends_a_process_saves(tmp_path, name, monkeypatch):
    import signal

    run = tiny_trainer(tmp_path, model="resnet8", batch_size=16)
    step = run.train_step
    monkeypatch.setattr(
        run, "train_step", lambda *batch: step(*batch) or run.step == 2 and signal.raise_signal(getattr(signal, name))
    )
    with pytest.raises(Interrupted, match=f"stopped by {name} after step 2"):
        run.fit()
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 2


def test_nohup_is_heeded(monkeypatch):
    import signal

    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with trainer.StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
        assert stop.signum is None
    finally:
        signal.signal(signal.SIGHUP, former)


def test_the_better_of_two_epochs_of_one_accuracy(tmp_path, monkeypatch):
    from fastres.train.evaluate import Scores

    losses = iter([0.5, 0.7, 0.3, 0.4])
    monkeypatch.setattr(trainer, "evaluate", lambda *args: Scores(next(losses), 0.5))
    run = tiny_trainer(tmp_path, model="resnet8", batch_size=48, epochs=4)
    run.fit()
    assert load_checkpoint(tmp_path / "best.pt")["epoch"] == 3


def test_validation_that_does_not_fit_takes_smaller_batches(tmp_path, monkeypatch):
    expected = tiny_trainer(tmp_path / "whole", model="resnet8", batch_size=48, epochs=1, eval_batch_size=5).fit()[0]
    run = tiny_trainer(tmp_path / "run", model="resnet8", batch_size=48, epochs=1)
    said, forward = [], run.model.forward
    run.say = said.append

    def small_memory(images):
        if not run.model.training and len(images) > 6:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )
        return forward(images)

    monkeypatch.setattr(run.model, "forward", small_memory)
    (row,) = run.fit()
    assert row["val_accuracy"] == expected["val_accuracy"] and row["val_loss"] == pytest.approx(expected["val_loss"])
    assert [line.split("(")[0] for line in said[1:4]] == [
        f"validation batches of {size} images do not fit into memory " for size in (40, 20, 10)
    ]
    monkeypatch.setattr(run.model, "forward", lambda images: (_ for _ in ()).throw(MemoryError()))
    run.model.eval()
    with pytest.raises(FastresError, match="not one image fits into memory in the validation"):
        run._end_epoch(trainer.StopRequest())


def test_config_facts(whole):
    facts = read_config(whole)
    assert facts["digest"] == tiny_dataset().digest and len(facts["run"]) == 32
    assert facts["options"] == tiny_config(**QUICK).to_dict()
