"""Own photos on the command line: one size from training to export, and images that pick nothing."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fastres import data
from fastres.cli import main
from fastres.data import DataError
from fastres.train import TrainConfig, Trainer, preset
from fastres.train.build import image_size
from fastres.train.checkpoint import load_checkpoint
from fastres.train.run_folder import RunFolder
from fastres.train.trained import load_trained

OPTIONS = "--model resnet8 --batch-size 8 --device cpu --precision fp32 --steps 2 --flip none".split()


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def photos(root, splits=("train", "val"), size=(28, 28), count=6):
    """Two classes: the left or the right half is bright."""
    generator = np.random.default_rng(0)
    for split in splits:
        for name in ("left", "right"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 60, (size[1], size[0], 3), dtype=np.uint8)
                half = slice(0, size[0] // 2) if name == "left" else slice(size[0] // 2, None)
                pixels[:, half] += 150
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def train(root, out, *more):
    assert main(["train", *OPTIONS, "--data", str(root), "--out", str(out), *more]) == 0
    return load_checkpoint(out / "last.pt")


@pytest.mark.parametrize(
    "more, stored, seen",
    [
        ([], 28, 28),
        (["--image-size", "32"], 28, 32),
        (["--image-size", "16"], 16, 16),
        (["--center-share", "0.6", "--memory-budget", "0", "--workers", "0"], 17, 28),
        (["--crop-scale", "0.4", "--center-share", "0.75", "--workers", "1"], 21, 28),
    ],
)
def test_one_size_in_training_evaluation_prediction_and_export(tmp_path, capsys, more, stored, seen):
    root, out = photos(tmp_path / "photos"), tmp_path / "run"
    saved = train(root, out, *more)
    assert f"taken at {seen}x{seen}" in capsys.readouterr().out
    assert (saved["image_size"], saved["stored_size"]) == (seen, stored)
    row = saved["history"][-1]
    capsys.readouterr()
    assert main(["eval", str(out / "last.pt"), "--device", "cpu"]) == 0
    assert f"loss {row['val_loss']:.4f}  accuracy {row['val_accuracy']:.2%}" in capsys.readouterr().out
    files = [str(path) for path in sorted((root / "val").rglob("*.png"))]
    assert main(["predict", *files, "--run", str(out / "last.pt"), "--top", "1", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    right = sum(line.split()[1] == path.split("/")[-2] for line, path in zip(lines, files))
    assert right / len(files) == row["val_accuracy"]
    assert main(["export", str(out), "--out", str(tmp_path / "m.pt2")]) == 0
    assert f"[batch, 3, {seen}, {seen}]" in capsys.readouterr().out


def test_a_test_set_that_picks_nothing_is_evaluated_at_the_end(tmp_path, capsys):
    root, out = photos(tmp_path / "photos", ("train", "val", "test")), tmp_path / "run"
    train(root, out)
    printed = capsys.readouterr().out
    result = json.loads((out / "test.json").read_text())
    assert f"test accuracy {result['accuracy']:.2%} of epoch {result['epoch']}" in printed and result["images"] == 12
    assert main(["eval", str(out), "--report", str(tmp_path / "report"), "--device", "cpu"]) == 0
    assert f"loss {result['loss']:.4f}" in capsys.readouterr().out
    for name in ("confusion.csv", "classes.csv"):
        assert (tmp_path / "report" / name).read_text() == (out / name).read_text()
    assert (out / "confusion.png").exists()
    assert not train(root, tmp_path / "other", "--data", str(photos(tmp_path / "two")))["history"] == []
    assert not (tmp_path / "other" / "test.json").exists()


def test_evaluation_takes_what_was_kept_from_training(tmp_path, capsys):
    root, out = photos(tmp_path / "photos", ("",), count=10), tmp_path / "run"
    assert main(["train", *OPTIONS, "--data", str(root), "--out", str(out)]) == 2
    assert "--val-share 0.2" in capsys.readouterr().err
    row = train(root, out, "--val-share", "0.3", "--val-seed", "3")["history"][-1]
    capsys.readouterr()
    assert main(["eval", str(out / "last.pt"), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert f"loss {row['val_loss']:.4f}" in printed and "6 test images" in printed
    assert main(["eval", str(out / "last.pt"), "--data", f"{root}/../photos", "--device", "cpu"]) == 0
    assert f"loss {row['val_loss']:.4f}" in capsys.readouterr().out
    (root / "left").rename(tmp_path / "left")
    (root / "new").mkdir()
    (tmp_path / "left").rename(root / "new" / "left")
    assert main(["eval", str(out / "last.pt"), "--data", str(root / "new"), "--device", "cpu"]) == 0
    assert "10 test images" in capsys.readouterr().out  # one class alone, all of it


def test_another_size_is_refused(tmp_path, capsys):
    root = photos(tmp_path / "photos", size=(40, 40))
    dataset = data.load(root)
    with pytest.raises(DataError, match="was loaded for 40 pixels, but --image-size is 32: load it with image_size=32"):
        Trainer(TrainConfig(model="resnet8", image_size=32, device="cpu"), dataset, RunFolder(tmp_path / "api"))
    assert image_size(TrainConfig(), data.load(root)) == 40
    train(root, tmp_path / "run")
    capsys.readouterr()
    for path in root.rglob("*.png"):
        Image.open(path).resize((24, 24)).save(path)
    assert main(["train", "--resume", str(tmp_path / "run")]) == 2
    assert "was trained on" in capsys.readouterr().err


def test_bad_files_are_left_out_on_demand(tmp_path, capsys):
    root = photos(tmp_path / "photos")
    (root / "train" / "left" / "x.png").write_bytes(b"")
    (root / "val" / "right" / "y.png").write_bytes(b"no image")
    assert main(["train", *OPTIONS, "--data", str(root), "--out", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert "x.png" in err and "y.png" in err and "--skip-bad" in err and err.count("\n") == 1
    train(root, tmp_path / "run", "--skip-bad")
    assert "2 unreadable images" in capsys.readouterr().out


def test_a_title_may_hold_dollar_signs(tmp_path):
    train(photos(tmp_path / "prices_$5_$10"), tmp_path / "run")
    assert (tmp_path / "run" / "curves.png").exists()


def test_the_learning_rate_follows_the_batch(tmp_path, capsys):
    assert preset("fast", batch_size=64).lr == preset("fast").lr / 4
    assert preset("fast", batch_size=64, lr=0.3).lr == 0.3 and preset("fast", epochs=2).lr == preset("fast").lr
    root = photos(tmp_path / "photos")
    saved = train(root, tmp_path / "run")
    assert saved["options"]["lr"] == pytest.approx(0.4 * 8 / 256)
    assert "learning rate 0.0125 for batches of 8, in proportion to fast's 0.4 for 256; --lr" in capsys.readouterr().out
    train(root, tmp_path / "other", "--lr", "0.01")
    assert "in proportion" not in capsys.readouterr().out


def test_a_checkpoint_from_before_sizes_were_kept(tmp_path):
    train(photos(tmp_path / "photos"), tmp_path / "run")
    content = load_checkpoint(tmp_path / "run" / "best.pt")
    del content["stored_size"]
    torch.save(content, tmp_path / "old.pt")
    assert load_trained(tmp_path / "old.pt", torch.device("cpu")).stored_size == 28
