"""What is printed: a reader that leaves ends no run, and an encoding that lacks a character ends none either."""

import io
import os
import sys

import pytest
import torch

from fastres import cli
from fastres.output import LastingStream, lasting_output


def closed_pipe(encoding="utf-8"):
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w", encoding=encoding, buffering=1)


def test_a_stream_whose_reader_left():
    stream = closed_pipe()
    lasting = LastingStream(stream, goes_on=True)
    for _ in range(3):
        assert lasting.write("a line\n") == 7
        lasting.flush()
    stream.close()  # nothing is left to fail at the process's end
    stream = closed_pipe()
    with pytest.raises(BrokenPipeError):
        LastingStream(stream, goes_on=False).write("a line\n")
    stream.close()


def test_characters_that_an_encoding_lacks():
    raw = io.BytesIO()
    stream = LastingStream(io.TextIOWrapper(raw, encoding="ascii", write_through=True), goes_on=False)
    print("0.5 ± 0.1 caf\udce9", file=stream)
    assert raw.getvalue() == b"0.5 \\xb1 0.1 caf\\udce9\n"


def test_a_stream_that_was_closed_from_the_start(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with lasting_output():
        print("nobody hears")
    assert sys.stdout is None


@pytest.mark.parametrize("both", [False, True])
def test_a_run_outlasts_its_reader(tmp_path, monkeypatch, both):
    """As ``fastres train | head -1``, and with ``2>&1``."""
    pipe = closed_pipe()
    monkeypatch.setattr(sys, "stdout", pipe)
    if both:
        monkeypatch.setattr(sys, "stderr", pipe)
    options = "--data synthetic --limit-train 64 --limit-test 40 --batch-size 16 --device cpu --precision fp32".split()
    options += f"--model resnet8 --image-size 16 --backend eager --epochs 1 --out {tmp_path / 'run'}".split()
    assert cli.main(["train", *options]) == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 1
    pipe.close()


def test_other_commands_end_without_a_word(monkeypatch, capsys):
    pipe = closed_pipe()
    monkeypatch.setattr(sys, "stdout", pipe)
    assert cli.main(["models"]) == 128 + 13
    pipe.close()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "error, words",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "CUDA out of memory: give it more memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), "give it more memory"),
        (MemoryError(), "out of memory: give it more memory"),
        (
            RuntimeError("can't start new thread"),
            "can't start new thread: let this user have more processes (ulimit -u)",
        ),
    ],
)
def test_too_little_of_something_is_one_line(error, words, monkeypatch, capsys):
    def fail():
        raise error

    monkeypatch.setattr("fastres.commands.models.describe_models", fail)
    assert cli.main(["models"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("fastres: error: ") and words in err and err.count("\n") == 1
    assert "lower --batch-size" in cli.remedy_of(MemoryError(), training=True)
    assert cli.remedy_of(RuntimeError("shapes differ"), training=True) is None
