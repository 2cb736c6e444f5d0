"""``fastres predict``: whatever names files, and every form of its answer."""

import csv
import io
import json
import sys

import numpy as np
import pytest
from PIL import Image

from fastres.cli import main


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "one"
    options = "--data synthetic --limit-train 16 --limit-test 10 --batch-size 8 --steps 1 --model resnet8 --device cpu"
    assert main(["train", *options.split(), "--precision", "fp32", "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def pictures(tmp_path):
    for i, name in enumerate(("a.png", "b/c.jpg", "b/deep/d.webp")):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    (tmp_path / "pictures" / "b" / "notes.txt").write_text("no image")
    return tmp_path / "pictures"


def predict(run, *argv):
    return main(["predict", *map(str, argv), "--run", str(run), "--device", "cpu"])


def test_files_folders_patterns_and_standard_input(run, pictures, capsys, monkeypatch):
    files = [str(pictures / name) for name in ("a.png", "b/c.jpg", "b/deep/d.webp")]

    def named():
        captured = capsys.readouterr()
        assert f"{run}/best.pt, epoch 1, trained on synthetic" in captured.err
        return captured.out, [line.split("  ")[0] for line in captured.out.splitlines()]

    assert predict(run, *files) == 0
    expected, names = named()
    assert names == files
    assert predict(run, pictures) == 0 and named() == (expected, files)
    assert predict(run, f"{pictures}/**/*.*p*g", f"{pictures}/b/d*/*") == 0 and named() == (expected, files)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(files) + "\n\n"))
    assert predict(run, "-") == 0 and named() == (expected, files)


def test_json_and_csv(run, pictures, capsys):
    assert predict(run, pictures, "--json", "--top", "99") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["file"] for row in rows] == sorted(row["file"] for row in rows) and len(rows) == 3
    for row in rows:
        assert sum(entry["probability"] for entry in row["classes"]) == pytest.approx(1, abs=1e-5)
    assert predict(run, pictures, "--csv", "--top", "2") == 0
    table = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    assert table[0] == ["file", "class 1", "probability 1", "class 2", "probability 2"]
    assert [(line[0], line[1]) for line in table[1:]] == [(row["file"], row["classes"][0]["class"]) for row in rows]


def test_what_cannot_be_read_is_named_after_the_others(run, pictures, capsys):
    (pictures / "x.png").write_bytes(b"")
    (pictures / "b" / "y.png").write_bytes(b"junk")
    assert predict(run, pictures) == 2
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 3
    assert "2 images cannot be read" in captured.err and "x.png" in captured.err and "y.png" in captured.err
    assert predict(run, pictures, "--skip-bad") == 0
    assert "left out: 2 unreadable images" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, complaint", [("empty", "holds no image"), ("*.nothing", "holds no image"), ("-", "no name came")]
)
def test_nothing_to_predict(run, tmp_path, capsys, monkeypatch, name, complaint):
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert predict(run, name if name == "-" else tmp_path / name) == 2
    err = capsys.readouterr().err
    assert complaint in err and err.count("\n") == 1


def test_views(run, pictures, capsys):
    assert predict(run, pictures, "--tta", "--tta-shift", "2") == 0
    assert main(["eval", str(run), "--device", "cpu", "--tta", "--tta-shift", "2"]) == 0
    assert "over six views, by 2 pixels " in capsys.readouterr().out
    for argv, words in (
        (["--tta-shift", "2"], "--tta-shift does nothing without --tta"),
        (["--tta", "--tta-shift", "64"], "--tta-shift 64 moves images of 32 pixels away"),
    ):
        assert predict(run, pictures, *argv) == 2 and words in capsys.readouterr().err
        tta = [] if "--tta" in argv else ["--no-tta"]  # which the run has
        assert main(["eval", str(run), "--device", "cpu", *tta, *argv]) == 2 and words in capsys.readouterr().err
