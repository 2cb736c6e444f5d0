"""Checkpoints: whole or not at all, never trusted blindly."""

import pickle

import pytest
import torch
from torch import nn

from fastres.train import checkpoint
from fastres.train.checkpoint import CheckpointError, load_checkpoint, load_weights, save_checkpoint


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"weights": {"w": torch.arange(1000.0)}, "history": [{"epoch": 1}]})
    return path


def test_round_trip(saved):
    content = load_checkpoint(saved)
    assert torch.equal(content["weights"]["w"], torch.arange(1000.0)) and content["history"] == [{"epoch": 1}]
    assert [file.name for file in saved.parent.iterdir()] == ["last.pt"]


def test_missing(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "last.pt")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_truncated(saved, share):
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(saved)


def test_one_altered_byte_of_a_weight(saved):
    whole = bytearray(saved.read_bytes())
    place = whole.find(torch.arange(1000.0).numpy().tobytes()[400:440])
    assert place > 0
    whole[place] ^= 1
    saved.write_bytes(whole)
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(saved)


class Malicious:
    """Writes a file when a careless loader unpickles it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, save):
    save({"format": checkpoint.FORMAT, "weights": Malicious(tmp_path / "harm")}, tmp_path / "x.pt")
    refused = "is refused: it holds more than tensors and plain values .* could run code; take another"
    damaged = "is damaged or not one of fastres .*: take another one or train again"  # no archive at all
    with pytest.raises(CheckpointError, match=refused if save is torch.save else damaged) as stopped:
        load_checkpoint(tmp_path / "x.pt")
    assert "\n" not in str(stopped.value) and str(tmp_path / "x.pt") in str(stopped.value)
    assert not (tmp_path / "harm").exists()


def test_somebody_elses_file(tmp_path):
    torch.save({"weights": {}}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint of this version"):
        load_checkpoint(tmp_path / "x.pt")


def test_full_disk_keeps_the_former_checkpoint(saved, monkeypatch):
    before = saved.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device; free space"):
        save_checkpoint(saved, {"weights": {}})
    assert saved.read_bytes() == before
    assert [file.name for file in saved.parent.iterdir()] == ["last.pt"]


@pytest.mark.parametrize(
    "other, words",
    [
        (nn.Linear(3, 5), r"'weight' has shape \(2, 3\), not \(5, 3\)"),
        (nn.Sequential(nn.Linear(3, 2)), "'0.weight' is missing in it"),
        (nn.Linear(3, 2, False), "'bias' is unknown"),
    ],
)
def test_weights_of_another_network(other, words):
    with pytest.raises(CheckpointError, match=words):
        load_weights(other, nn.Linear(3, 2).state_dict(), "x.pt")
