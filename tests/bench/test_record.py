"""Recorded results are whole, valid JSON and say where they come from."""

import json
import platform

import pytest
import torch

from bench.record import RESULTS, cpu_name, write_results


def test_results_carry_their_circumstances(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_results(path, {"seconds": [1.5, 2.0]})
    read = json.loads(path.read_text())
    assert read["seconds"] == [1.5, 2.0]
    assert read["versions"]["torch"] == torch.__version__ and read["versions"]["python"] == platform.python_version()
    assert read["cpu"] == cpu_name() and read["threads"] == torch.get_num_threads() and read["date"].endswith("+00:00")
    assert [file.name for file in path.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize("data", [{"seconds": float("nan")}, {"commit": "mine"}])
def test_what_cannot_be_recorded_leaves_the_former_file(data, tmp_path):
    write_results(tmp_path / "a.json", {"seconds": 1})
    before = (tmp_path / "a.json").read_bytes()
    with pytest.raises(ValueError):
        write_results(tmp_path / "a.json", data)
    assert (tmp_path / "a.json").read_bytes() == before


def test_committed_results_say_where_they_come_from():
    for file in RESULTS.glob("*.json"):
        read = json.loads(file.read_text())
        assert {"date", "commit", "versions", "device", "cpu", "threads"} <= read.keys(), file
