"""A few of every fault that the campaign tries by the hundred: nothing is lost, half written or taken for another."""

import zipfile

import pytest

from faults import child, damage, runs


@pytest.fixture
def folder(tmp_path):
    """One that another user may enter."""
    for path in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        path.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    "fault, refused",
    [
        (lambda folder: runs.kills(folder, 3), 0),
        (lambda folder: runs.size_limit(folder, 2), 3),
        (runs.read_only, 3),
        (lambda folder: runs.two_runs(folder, 1), 2),
        (lambda folder: runs.clock_jumps(folder, (4102444800,)), 0),
        (lambda folder: runs.operations(folder, 3), 0),
        (runs.hostile_folders, 19),
        (lambda folder: runs.lost(folder, ["in an epoch"]), 1),
        (runs.other_data, 6),
    ],
    ids=[
        "kill -9",
        "file-size limit",
        "read-only folder",
        "two runs in one folder",
        "clock jumps",
        "file operations",
        "hostile folders",
        "lost ranks",
        "other data",
    ],
)
def test_runs(fault, refused, folder):
    row = fault(folder)
    assert row["reasons"] == [] and row["wrong"] == 0
    assert row["refused"] >= refused and row["tried"] == row["refused"] + row["harmless"] > 0


def test_a_full_file_system(folder):
    row = runs.full_file_system(folder, 4)
    if row is None:
        pytest.skip("no file system can be mounted here")
    assert row["reasons"] == [] and row["wrong"] == 0 and row["refused"] > 0 and row["tried"] == 4


@pytest.mark.parametrize("kind", damage.KINDS)
def test_damaged_files(kind, folder):
    row = child.table_row(kind, damage.KINDS[kind](folder / "files", 60, seed=1))
    assert row["reasons"] == [] and row["refused"] > 30 and row["tried"] == 60


def test_damage_that_no_checksum_stops_is_found(folder, monkeypatch):
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda self: None)
    row = child.table_row("checkpoint", damage.checkpoint(folder / "files", 60, seed=1))
    assert row["wrong"] > 0 and any("other data, without a word" in reason for reason in row["reasons"])


def test_a_run_that_ends_otherwise_is_found():
    row = {"epoch": 1, "train_loss": 1.0, "val_accuracy": 0.5}
    run = {"weights": {}, "optimizer": {"state": {}}, "history": [row]}
    assert child.same_run(run, dict(run))
    assert not child.same_run(run, {**run, "history": [{**row, "train_loss": 1.5}]})
