"""Recorded results are whole, valid JSON and say where they come from."""

import json
import platform

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.record import RESULTS, as_lines, cpu_name, write_results


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


def test_committed_results_have_a_row_a_line():
    for file in RESULTS.rglob("*.json"):
        text = file.read_text()
        assert text == as_lines(json.loads(text)) + "\n", f"{file}: python -m bench.record rewrites it"


PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()


@settings(max_examples=40, deadline=None)
@given(st.recursive(PLAIN, lambda part: st.lists(part) | st.dictionaries(st.text(), part)))
def test_lines_are_the_same_json(value):
    text = as_lines(value)
    assert json.loads(text) == value
    assert list(map(str.strip, text.splitlines())) == [line.lstrip(" ") for line in text.split("\n")]


def test_a_row_is_a_line():
    rows = [{"name": f"row {i}", "sizes": list(range(60)), "options": {"a": i}} for i in range(3)]
    lines = as_lines({"date": "today", "rows": rows}).splitlines()
    assert [line.strip().rstrip(",") for line in lines[3:6]] == [json.dumps(row) for row in rows]
    assert len(lines) == 8
