"""The loop: it learns, resumes bit for bit, and stops well when the loss is not finite."""

import json
import multiprocessing
import os
import signal

import pytest
import support_kills
import torch
from support_train import same_weights, tiny_config, tiny_dataset, tiny_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from fastres.data import Dataset, Split
from fastres.errors import FastresError
from fastres.train import Interrupted, NonFiniteLoss, OverflowingGradients, Trainer, build, report, trainer
from fastres.train.checkpoint import CheckpointError, load_checkpoint
from fastres.train.evaluate import evaluate
from fastres.train.run_folder import RunFolder
from fastres.train.views import Views

TIMING = {"seconds", "train_seconds", "images_per_second", "train_seconds_per_batch", "val_seconds_per_batch"}
TIMING |= {"peak_memory_mib"}


def facts(history):
    return [{name: value for name, value in row.items() if name not in TIMING} for row in history]


def test_learns_and_leaves_a_run_folder(tmp_path):
    run = tiny_trainer(tmp_path, epochs=6, label_smoothing=0.1, ema=0.8, tta=True, clip=5.0)
    history = run.fit()
    assert history[-1]["val_accuracy"] >= 0.9 > history[0]["val_accuracy"]
    assert [row["epoch"] for row in history] == [1, 2, 3, 4, 5, 6] and history[-1]["step"] == 36
    assert [row["tta_accuracy"] is None for row in history] == 5 * [True] + [False]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == history
    assert any(file.name.startswith("events.out.tfevents") for file in tmp_path.iterdir())
    best = load_checkpoint(tmp_path / "best.pt")
    first_best = max(history, key=report.rank)
    assert best["epoch"] == first_best["epoch"] and best["data"] == "tiny"


def test_any_epoch_may_be_the_last_one_where_patience_ends_the_run(tmp_path):
    rows = tiny_trainer(tmp_path, epochs=3, tta=True, patience=2).fit()
    assert all(0 <= row["tta_accuracy"] <= 1 for row in rows)


@pytest.mark.parametrize("changes", [dict(ema=0.9, flip="alternating", cutout=3), dict(steps=9)])
def test_resume_after_every_epoch_is_bit_for_bit(tmp_path, changes):
    whole = tiny_trainer(tmp_path / "whole", **changes)
    whole.fit()
    part = tiny_trainer(tmp_path / "part", **changes)
    part._train_epoch(trainer.StopRequest())
    part._end_epoch(trainer.StopRequest())
    part.folder.close()
    torch.manual_seed(1234)  # whatever the process did before must not matter
    rest = tiny_trainer(tmp_path / "part", **changes)
    rest.resume()
    rest.fit()
    assert same_weights(rest.evaluated.state_dict(), whole.evaluated.state_dict())
    assert facts(rest.history) == facts(whole.history)


@pytest.mark.parametrize(
    "changes, step, place",
    [
        (dict(ema=0.9, accumulate=2, clip=1.0, flip="random", cutout=3), 8, (1, 2)),
        (dict(precision="fp16", batch_size=48, ema=0.5, accumulate=2), 3, (1, 1)),
        (dict(precision="bf16", batch_size=32), 3, (0, 3)),  # the epoch's last step, before its validation
        (dict(), 12, (1, 6)),  # the run's last step
        (dict(steps=9), 9, (1, 3)),  # the same, with an epoch that is not whole
    ],
)
def test_a_signal_in_mid_epoch_saves_and_resumes_bit_for_bit(changes, step, place, tmp_path, monkeypatch):
    whole = tiny_trainer(tmp_path / "whole", **changes)
    whole.fit()
    part = tiny_trainer(tmp_path / "part", **changes)
    take_step = part.train_step

    def step_then_signal(images, labels):
        take_step(images, labels)
        if part.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(part, "train_step", step_then_signal)
    with pytest.raises(Interrupted, match=f"SIGTERM after step {step} of {whole.total_steps}") as stopped:
        part.fit()
    assert stopped.value.signum == signal.SIGTERM
    part.folder.close()
    torch.manual_seed(1234)
    rest = tiny_trainer(tmp_path / "part", **changes)
    rest.resume()
    assert (rest.epoch, rest.batch) == place
    rest.fit()
    assert same_weights(rest.model.state_dict(), whole.model.state_dict())
    assert same_weights(rest.evaluated.state_dict(), whole.evaluated.state_dict())
    assert facts(rest.history) == facts(whole.history)


def test_a_signal_in_the_validation_does_not_wait_for_its_end(tmp_path, monkeypatch):
    whole = tiny_trainer(tmp_path / "whole", eval_batch_size=10)
    whole.fit()
    part = tiny_trainer(tmp_path / "part", eval_batch_size=10)
    epoch, served = part.val_batches.epoch, []

    def signal_after_the_second(number):
        for batch in epoch(number):
            served.append(batch)
            if len(served) == 2:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch

    monkeypatch.setattr(part.val_batches, "epoch", signal_after_the_second)
    with pytest.raises(Interrupted, match="SIGINT after step 6 of 12"):
        part.fit()
    assert len(served) == 2 and part.history == [] and not part.folder.best.exists()
    part.folder.close()
    rest = tiny_trainer(tmp_path / "part", eval_batch_size=10)
    rest.resume()
    rest.fit()
    assert facts(rest.history) == facts(whole.history)


# forks of a process that has only imported modules: this one has threads by now
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["support_kills"])
# of two epochs of which each is the best so far, in this order
WRITES = ["last.pt", "best.pt", "metrics.jsonl", "previous.pt", "last.pt", "best.pt", "metrics.jsonl"]


@pytest.mark.parametrize("number, name", list(enumerate(WRITES, 1)))
@pytest.mark.parametrize("moment", ["before", "after"])
def test_kill_9_around_every_write_loses_at_most_one_epoch(number, name, moment, tmp_path):
    folder = tmp_path / "run"
    process = PROCESSES.Process(target=support_kills.train_and_die, args=(folder, number, moment))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (len(list(folder.glob(f".{name}.*.tmp"))) == 1) == (moment == "before")
    rest = tiny_trainer(folder, **support_kills.OPTIONS)
    assert not list(folder.glob(".*.tmp"))
    done = WRITES[: number - (moment == "before")].count("last.pt")
    if rest.folder.begun():
        rest.resume()
    assert rest.epoch == done
    rest.fit()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert facts(rows) == facts(kill_9_reference(tmp_path))
    assert [event.step for event in events(folder)] == [6, 12]
    assert load_checkpoint(folder / "best.pt")["epoch"] == max(rows, key=report.rank)["epoch"]


def events(folder):
    """The validation accuracies as TensorBoard shows them."""
    shown = EventAccumulator(str(folder)).Reload()
    return shown.Scalars("accuracy/val")


def kill_9_reference(tmp_path):
    """The rows of the same run without a fault."""
    if not REFERENCE:
        REFERENCE.extend(tiny_trainer(tmp_path / "whole", **support_kills.OPTIONS).fit())
    return REFERENCE


REFERENCE = []


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    run = tiny_trainer(tmp_path)
    step = run.train_step

    def poisoned(images, labels):
        step(images * float("nan") if run.step == 8 else images, labels)

    monkeypatch.setattr(run, "train_step", poisoned)
    with pytest.raises(NonFiniteLoss, match=r"epoch 2, step 9: lower --lr .*last.pt is the last good checkpoint"):
        run.fit()
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 6


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_weights_that_turn_nan_in_an_epochs_last_step_leave_both_checkpoints(tmp_path, monkeypatch, precision):
    """No loss has shown it yet: the validation's does."""
    run = tiny_trainer(tmp_path, model="resnet8", precision=precision)
    step, kept = run.train_step, {}

    def spoil(images, labels):
        step(images, labels)
        if run.step == 12:
            next(run.model.parameters()).data[0] = float("nan")
            kept.update({path: path.read_bytes() for path in (run.folder.last, run.folder.best)})

    monkeypatch.setattr(run, "train_step", spoil)
    with pytest.raises(
        NonFiniteLoss, match=r"the validation loss is NaN .* epoch 2.* lower --lr .*last.pt is the last good"
    ):
        run.fit()
    assert kept and all(path.read_bytes() == content for path, content in kept.items())
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def in_fp16(folder, scale: float, said: list[str] | None = None, **changes) -> Trainer:
    """A trainer in fp16 that begins at a scale of the loss: gradients at 2**32 overflow, and those at 2**8 do not."""
    run = tiny_trainer(folder, model="resnet8", precision="fp16", **changes)
    run.scaler.load_state_dict({**run.scaler.state_dict(), "scale": scale})
    run.say = (said if said is not None else []).append
    return run


def test_steps_that_fp16_skips_are_counted_and_shown(tmp_path):
    said = []
    run = in_fp16(tmp_path, 2.0**32, said, epochs=4)
    first = [p.detach().clone() for p in run.model.parameters()]
    run._train_epoch(trainer.StopRequest())
    assert all(map(torch.equal, first, run.model.parameters()))
    run._end_epoch(trainer.StopRequest())
    assert run.history[0]["skipped_steps"] == 6 and len(said) == 2
    assert "no step of epoch 1 was taken" in said[1] and "at a loss scale of 6.71089e+07 and above" in said[1]
    assert "add --precision bf16 or fp32" in said[1]
    history = run.fit()
    skipped = [row["skipped_steps"] for row in history]
    assert 0 < skipped[1] <= 6 and skipped[-1] == 0
    assert run.scaler.get_scale() == 2.0 ** (32 - sum(skipped))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped_steps"] for row in rows] == skipped
    end = said[2].index("  skipped") + len("  skipped")  # of the column, under the heading of `fit`
    assert [int(line[:end].split()[-1]) for line in said[3:] if "%" in line] == skipped


def test_skipped_steps_are_resumed(tmp_path):
    part = in_fp16(tmp_path, 2.0**32)
    for images, labels in part.train_batches.epoch(0):
        part.train_step(images, labels)
        if part.step == 4:
            break
    part.save()
    part.folder.close()
    rest = in_fp16(tmp_path, 1.0)
    rest.resume()
    rest._train_epoch(trainer.StopRequest())
    rest._end_epoch(trainer.StopRequest())
    assert rest.history[0]["skipped_steps"] == 6


def test_gradients_that_overflow_at_every_scale_end_the_run(tmp_path):
    run = in_fp16(tmp_path, 8.0)
    run.fit()
    run.folder.close()
    kept = {path: path.read_bytes() for path in (run.folder.last, run.folder.best)}
    more = in_fp16(tmp_path, 8.0, epochs=4)
    more.resume()
    next(more.model.parameters()).register_hook(lambda grad: grad * float("inf"))
    message = (
        r"overflow fp16 in epoch 3, step 16, at every loss scale down to 1: add --precision bf16 .*last.pt is the last"
    )
    with pytest.raises(OverflowingGradients, match=message):
        more.fit()
    assert all(path.read_bytes() == content for path, content in kept.items())


class PlainNetwork(nn.Module):
    """No BatchNorm, so that a batch in parts has the gradient of the whole."""

    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, num_classes))

    def forward(self, x):
        return self.body(x)


def test_accumulation_and_clipping(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "create_model", lambda name, num_classes, **_: PlainNetwork(num_classes))
    whole = tiny_trainer(tmp_path / "a", epochs=1)
    parts = tiny_trainer(tmp_path / "b", epochs=1, accumulate=4)
    for run in (whole, parts):
        run.fit()
    for a, b in zip(whole.model.parameters(), parts.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert parts.history[0]["train_loss"] == pytest.approx(whole.history[0]["train_loss"], rel=1e-5)

    plain_sgd = dict(momentum=0.0, nesterov=False, weight_decay=0.0, warmup=0.0)
    clipped = tiny_trainer(tmp_path / "c", steps=1, clip=1e-3, **plain_sgd)
    before = [p.detach().clone() for p in clipped.model.parameters()]
    clipped.fit()
    moved = torch.cat([(p - q).flatten() for p, q in zip(clipped.model.parameters(), before)]).norm()
    assert moved.item() == pytest.approx(0.05 * 1e-3, rel=1e-3)


def test_evaluation_counts_every_image_and_averages_mirror_images(tmp_path):
    run = tiny_trainer(tmp_path, eval_batch_size=16)
    dataset = tiny_dataset()
    images = (dataset.test.images.double() - 110) / 60
    model = run.model.double().eval()
    with torch.no_grad():
        logits, mirrored = model(images), model(images.flip(3))
    expected = torch.nn.functional.cross_entropy(logits, dataset.test.labels)
    run.model.float()
    scores = evaluate(run.model, run.val_batches, torch.float32, Views())
    assert scores.loss == pytest.approx(expected.item(), rel=1e-4)
    for accuracy, outputs in ((scores.accuracy, logits), (scores.tta_accuracy, logits + mirrored)):
        assert accuracy == (outputs.argmax(1) == dataset.test.labels).double().mean().item()
    assert evaluate(run.model, run.val_batches, torch.float32, None).tta_accuracy is None


def test_compiled_network_learns_the_same(tmp_path):
    plain = tiny_trainer(tmp_path / "plain", steps=3)
    compiled = tiny_trainer(tmp_path / "compiled", steps=3)
    compiled.update.network = torch.compile(compiled.model, backend="aot_eager")
    for run in (plain, compiled):
        run.fit()
    assert compiled.history[0]["train_loss"] == pytest.approx(plain.history[0]["train_loss"], rel=1e-3)
    assert load_checkpoint(tmp_path / "compiled" / "last.pt")["weights"].keys() == plain.model.state_dict().keys()


def test_seed_decides_the_run(tmp_path):
    runs = [tiny_trainer(tmp_path / name, epochs=1, seed=seed) for name, seed in (("a", 3), ("b", 3), ("c", 4))]
    for run in runs:
        run.fit()
    a, b, c = (run.model.state_dict() for run in runs)
    assert same_weights(a, b) and not same_weights(a, c)


def test_a_checkpoint_that_no_run_can_go_on_from(tmp_path):
    run = tiny_trainer(tmp_path, epochs=1)
    run.fit()
    run.folder.best.rename(run.folder.last)
    with pytest.raises(CheckpointError, match="last.pt lacks 'average', so no run can go on from it"):
        run.resume()


def test_weights_that_are_not_finite_are_not_saved_by_a_signal(tmp_path, monkeypatch):
    run = tiny_trainer(tmp_path)
    take_step = run.train_step

    def spoil(images, labels):
        take_step(images, labels)
        if run.step == 8:  # its loss was finite, its gradient was not
            next(run.model.parameters()).data[0] = float("nan")
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(run, "train_step", spoil)
    with pytest.raises(NonFiniteLoss, match="last.pt is the last good checkpoint"):
        run.fit()
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 6


def test_other_data_on_resume(tmp_path):
    run = tiny_trainer(tmp_path)
    run.save()
    same = vars(tiny_dataset())
    run.dataset = Dataset(**{**same, "label": "renamed"})
    run.resume()
    flipped = Split(same["train"].images, same["train"].labels.flip(0))
    for label, words in (("other", "not on 'other'"), ("tiny", "not on 'these images or labels, which have changed'")):
        run.dataset = Dataset(**{**same, "train": flipped, "label": label, "digest": ""})
        with pytest.raises(FastresError, match=f"was trained on 'tiny', {words}: give the former data"):
            run.resume()


def test_folder_faults(tmp_path):
    first = RunFolder(tmp_path / "run")
    with pytest.raises(FastresError, match="in use by another run"):
        RunFolder(tmp_path / "run")
    Trainer(tiny_config(), tiny_dataset(), first, say=lambda line: None).save()
    first.close()
    with pytest.raises(FastresError, match="already holds a run: go on with `--resume"):
        RunFolder(tmp_path / "run")
    with pytest.raises(FastresError, match="cannot write to run folder"):
        RunFolder(tmp_path / "run" / "last.pt" / "below-a-file")


CURVES = ("epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy")


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    run = tiny_trainer(tmp_path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(FastresError, match="cannot write metrics.jsonl in .*: No space left on device; free space"):
        run.folder.write_metrics([{"epoch": 1}])
    with pytest.raises(FastresError, match="cannot write curves.png"):
        run.folder.write_curves([dict.fromkeys(CURVES, 0.0)], "tiny")


def test_a_folder_that_stays_empty_is_removed(tmp_path):
    RunFolder(tmp_path / "run").close()
    assert not (tmp_path / "run").exists()
    (tmp_path / "kept").mkdir()
    RunFolder(tmp_path / "kept").close()
    assert os.listdir(tmp_path / "kept") == []
