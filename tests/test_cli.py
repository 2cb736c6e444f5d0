"""The command line as a user meets it: one good run from end to end, and every fault in one line."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from support_data import write_image_folder

from fastres import data
from fastres.cli import main
from fastres.train.checkpoint import load_checkpoint

QUICK = "--data synthetic --limit-train 64 --limit-test 40 --batch-size 16 --device cpu --precision fp32".split()
QUICK += ["--model", "resnet20", "--image-size", "16"]


def quick(*more: str) -> list[str]:
    return ["train", *QUICK, *more]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "one"
    assert main(quick("--epochs", "1", "--out", str(folder))) == 0
    return folder


def test_train_says_what_it_did(tmp_path, capsys):
    assert main(quick("--epochs", "1", "--out", str(tmp_path / "run"))) == 0
    out = capsys.readouterr().out
    for word in (
        "val loss",
        "val acc",
        "images/s",
        "seconds",
        "synthetic",
        "validation accuracy",
        "PFLOP |",
        "s of training (",
        "the first step",
        "s of reading the data",
    ):
        assert word in out
    names = {file.name for file in (tmp_path / "run").iterdir()}
    assert {"config.json", "metrics.jsonl", "curves.png", "last.pt", "best.pt"} <= names


def test_eval_repeats_the_validation_accuracy(run, capsys):
    assert main(["eval", str(run), "--device", "cpu"]) == 0
    accuracy = load_checkpoint(run / "last.pt")["history"][0]["val_accuracy"]
    assert f"accuracy {accuracy:.2%}" in capsys.readouterr().out


def test_predict_prints_classes_that_sum_to_one(run, tmp_path, capsys):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    assert main(["predict", str(tmp_path / "a.png"), "--run", str(run), "--top", "99", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    shares = [float(word[:-1]) for word in out.split() if word.endswith("%")]
    assert len(shares) == 10 and sum(shares) == pytest.approx(100, abs=0.6)


def test_models_lists_published_sizes(capsys):
    assert main(["models"]) == 0
    lines = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines()}
    assert lines["resnet20"] == "0.27" and lines["resnet1202"] == "19.42" and "notebook" in lines


@pytest.mark.parametrize(
    "argv, words",
    [
        (quick("--model", "resnet51"), "unknown model 'resnet51': did you mean"),
        (["train", "--preset", "fats"], "unknown preset 'fats': did you mean 'fast'"),
        (quick("--lr", "-3"), "--lr -3.0 is too small"),
        (quick("--stem", "cifar"), "model 'resnet20' has no option 'stem'"),
        (quick("--batch-size", "65"), "65"),
        (quick("--data", "/no/such/folder"), "/no/such/folder"),
        (quick("--device", "tpu"), "choose auto, cpu, cuda"),
        (quick("--out", "/dev/null/run"), "cannot write to run folder /dev/null/run"),
        (["train", "--resume", "/no/such/run"], "no run in /no/such/run"),
        (["eval", "/no/such/run"], "no checkpoint at /no/such/run"),
        (["train", "--preset", ""], "unknown preset ''"),
        (quick("--muon-lr", "0.1"), "--muon-lr does nothing without --optimizer muon: add it, or leave the option out"),
        (quick("--milestones", "0.5"), "--milestones does nothing without --schedule step"),
        (quick("--decay-factor", "0.2", "--schedule", "cosine"), "--decay-factor does nothing without --schedule step"),
        (
            quick("--warmup", "0.1", "--schedule", "constant"),
            "--warmup does nothing without a --schedule that is not constant",
        ),
        (quick("--data-root", "x"), "--data-root does nothing without --data auto or cifar10"),
        (quick("--sync-bn"), "--sync-bn does nothing in one process"),
        (["sweep", "--set", "lr=0.1,0.2", "--set", "lr=0.3"], "--set lr is given twice: write all its values in one"),
        (["sweep", "--set", "optimizer=sgd", "--muon-lr", "0.1"], "--muon-lr does nothing without --optimizer muon"),
        (["bench", "--json", "/no/such/folder/x.json"], "/x.json: No such file or directory; choose another --json"),
        (["export", "--out", "/no/such/folder/x.onnx"], "/x.onnx: No such file or directory; choose another --out"),
        (quick("--seed", "9" * 30), "is too large"),
        (["predict", "/no/such/image.png"], "no finished run under runs/"),
    ],
)
def test_faults_are_one_line(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert words in err and err.startswith("fastres: error: ") and err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is absent")
def test_cuda_asked_for_and_absent(capsys):
    assert main(quick("--device", "cuda")) == 2
    assert "use --device cpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "--lr", "fast"],
        ["train", "--schedule", "up"],
        ["train", "--colour", "1"],
        ["train", "--decay", "5e-4"],
        ["train", "--nesterov", "--batch", "8"],
        ["predict", "a.png", "--to", "2"],
        ["tarin"],
        ["predict", "a.png", "--top", "0"],
    ],
)
def test_bad_usage_is_one_line(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1 and "error:" in err


def test_unreadable_image(run, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG and no more")
    assert main(["predict", str(tmp_path / "broken.png"), "--run", str(run)]) == 2
    err = capsys.readouterr().err
    assert "broken.png" in err and err.count("\n") == 1


def test_a_damaged_training_image_is_named_and_leaves_no_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FASTRES_CACHE", str(tmp_path / "cache" / "fastres"))
    write_image_folder(tmp_path / "insects", train=10)
    (tmp_path / "insects" / "train" / "bee" / "0007.png").write_bytes(b"\x89PNG and no more")
    assert main(quick("--data", str(tmp_path / "insects"), "--out", str(tmp_path / "run"))) == 2
    err = capsys.readouterr().err
    assert "insects/train/bee/0007.png cannot be read" in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_photos_are_decoded_at_the_size_that_is_trained_on(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTRES_CACHE", str(tmp_path / "cache" / "fastres"))
    write_image_folder(tmp_path / "insects", train=10, size=(70, 60))
    folder = str(tmp_path / "run")
    assert main(quick("--data", str(tmp_path / "insects"), "--image-size", "48", "--steps", "1", "--out", folder)) == 0
    (cache,) = (tmp_path / "cache" / "fastres").glob("*.npz")
    assert np.load(cache)["train_images"].shape == (20, 48, 48, 3)
    assert main(["eval", folder]) == 0
    assert len(list(cache.parent.glob("*.npz"))) == 1


def test_a_resumed_run_keeps_its_options(run, capsys):
    assert main(["train", "--resume", str(run), "--lr", "0.5"]) == 2
    assert "--lr cannot change in a resumed run" in capsys.readouterr().err


def test_resuming_a_finished_run_says_so_and_changes_nothing(run, capsys):
    before = (run / "last.pt").read_bytes()
    assert main(["train", "--resume", str(run)]) == 0
    assert "validation accuracy" in capsys.readouterr().out
    assert (run / "last.pt").read_bytes() == before


def test_auto_data_is_announced(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data.download, "reachable", lambda url, seconds: False)
    auto = [word if word != "synthetic" else "auto" for word in quick("--epochs", "1", "--out", str(tmp_path / "run"))]
    assert main(auto) == 0
    assert "\ndata: synthetic shapes (not CIFAR-10); not taken: CIFAR-10 is not under" in capsys.readouterr().out


def test_a_run_without_a_checkpoint_yet_starts_again(run, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_bytes((run / "config.json").read_bytes())
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert "was stopped before its first checkpoint: starting again" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == load_checkpoint(run / "last.pt")["step"]


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_before_training_leaves_no_run(number, status, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        signal.raise_signal(number)  # to this thread: os.kill may go to another, and be heard too late

    monkeypatch.setattr(data, "load", interrupted)
    try:
        ended = main(quick("--out", str(tmp_path / "run")))
    except SystemExit as leaving:
        ended = leaving.code
    assert ended == status and not (tmp_path / "run").exists()


def test_own_files_are_left_alone(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert main(quick("--out", str(tmp_path))) == 2
    assert f"run folder {tmp_path} holds 'config.json', which is no run's" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["config.json"] and (tmp_path / "config.json").read_text() == "{}"


def test_runs_that_start_in_one_second(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "20260101-000000")
    for _ in range(2):
        assert main(quick("--steps", "1", "--model", "resnet8")) == 0
    assert sorted(os.listdir("runs")) == ["resnet8-20260101-000000", "resnet8-20260101-000000-2"]


def test_the_average_is_evaluated(tmp_path, capsys):
    """``last.pt`` of a run with a weight average has the table's figures, not those of the weights behind it."""
    folder = tmp_path / "run"
    assert main(quick("--model", "resnet8", "--epochs", "2", "--ema", "0.5", "--lr", "0.05", "--out", str(folder))) == 0
    row = load_checkpoint(folder / "last.pt")["history"][-1]
    capsys.readouterr()
    assert main(["eval", str(folder / "last.pt"), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"loss {row['val_loss']:.4f}  accuracy {row['val_accuracy']:.2%}") and "weight average" in out


def test_images_are_predicted_a_few_at_a_time(run, tmp_path, capsys, monkeypatch):
    for number in range(5):
        Image.new("RGB", (20, 20), (50 * number, 0, 0)).save(tmp_path / f"{number}.png")
    paths = [str(tmp_path / f"{number}.png") for number in range(5)]
    argv = ["predict", *paths, "--run", str(run), "--device", "cpu"]
    assert main(argv) == 0
    whole, sizes, decode = capsys.readouterr().out, [], data.decode.decode
    monkeypatch.setattr("fastres.predict.CHUNK", 2)

    def counting(files, *arguments, **options):
        sizes.append(len(files))
        return decode(files, *arguments, **options)

    monkeypatch.setattr("fastres.predict.decode", counting)
    assert main(argv) == 0
    assert capsys.readouterr().out == whole and sizes == [2, 2, 1]


def test_a_name_with_a_dollar_sign_and_no_utf_8(tmp_path, capsys, monkeypatch, caplog):
    monkeypatch.setenv("FASTRES_CACHE", str(tmp_path / "cache"))
    insects = tmp_path / os.fsdecode(b"prices_$5_$10_\xe9")
    write_image_folder(insects, train=10)
    folder = tmp_path / os.fsdecode(b"run \xe9")
    options = ["--model", "resnet8", "--data", str(insects), "--out", str(folder)]
    assert main(quick(*options, "--epochs", "1")) == 0
    assert (folder / "curves.png").exists()
    events = next(folder.glob("events.out.tfevents.*"))
    assert "gets no events" not in caplog.text and b"val" in events.read_bytes()
    insects.rename(tmp_path / "renamed")
    assert main(["train", "--resume", str(folder), "--data", str(tmp_path / "renamed")]) == 0
    shutil.rmtree(tmp_path / "renamed" / "test")
    shutil.copytree(tmp_path / "renamed" / "train", tmp_path / "renamed" / "test")
    assert main(["train", "--resume", str(folder), "--data", str(tmp_path / "renamed")]) == 2
    err = capsys.readouterr().err
    assert "was trained on 'image folder prices_$5_$10_" in err and err.count("\n") == 1


def start(*argv: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "fastres", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_until(condition, process, seconds=120):
    """Wait for a condition while the process works towards it."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_process_can_be_resumed(number, tmp_path):
    folder = tmp_path / "run"
    process = start(*quick("--epochs", "400", "--out", str(folder)))
    metrics = folder / "metrics.jsonl"
    wait_until(metrics.exists, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    saved = load_checkpoint(folder / "last.pt")
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 128 + number
        assert f"go on with `fastres train --resume {folder}`" in err
    again = start("train", "--resume", str(folder))
    before = len(saved["history"])
    wait_until(lambda: len(metrics.read_text().splitlines()) > before, again)
    again.terminate()
    again.communicate(timeout=60)
    assert [row["epoch"] for row in load_checkpoint(folder / "last.pt")["history"]][: before + 1] == list(
        range(1, before + 2)
    )
