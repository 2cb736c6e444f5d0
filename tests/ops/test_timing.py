"""The timed choice: fastest wins, once, and is remembered on disk."""

import json
import math
import re
import warnings

import pytest
import torch

from fastres.kernels.configs import at_rank, conv_configs, taken
from fastres.ops.timing import TimedChoices, choices_path


def fake_timer(times):
    """Timer of calls that return the name under which ``times`` holds their milliseconds or their error."""
    calls = []

    def timer(call):
        name = call()
        calls.append(name)
        if isinstance(times[name], Exception):
            raise times[name]
        return times[name]

    return timer, calls


def candidates(*names):
    return {name: (lambda name=name: name) for name in names}


def test_the_fastest_wins_once_for_all(tmp_path):
    path = tmp_path / "cache" / "choices.json"
    timer, calls = fake_timer({"triton": 2.0, "library": 1.0})
    choices = TimedChoices(path, "gpu", timer)
    assert choices.choose("conv", candidates("triton", "library")) == "library"
    assert choices.choose("conv", candidates("triton", "library")) == "library"
    assert calls == ["triton", "library"]
    again = TimedChoices(path, "gpu", timer)
    assert again.choose("conv", candidates("triton", "library")) == "library" and len(calls) == 2
    assert json.loads(path.read_text())["gpu"]["conv"]["milliseconds"] == {"triton": 2.0, "library": 1.0}


def test_another_machine_measures_for_itself(tmp_path):
    path = tmp_path / "choices.json"
    for machine, times in (("a", {"x": 1.0, "y": 2.0}), ("b", {"x": 2.0, "y": 1.0})):
        timer, calls = fake_timer(times)
        winner = TimedChoices(path, machine, timer).choose("op", candidates("x", "y"))
        assert winner == min(times, key=times.get) and len(calls) == 2
    assert set(json.loads(path.read_text())) == {"a", "b"}


def test_a_failing_candidate_loses_and_its_error_is_kept(tmp_path):
    path = tmp_path / "choices.json"
    timer, _ = fake_timer({"x": RuntimeError("out of shared memory"), "y": 5.0})
    assert TimedChoices(path, "gpu", timer).choose("op", candidates("x", "y")) == "y"
    assert "out of shared memory" in json.loads(path.read_text())["gpu"]["op"]["errors"]["x"]


def test_the_same_tiles_are_timed_once(tmp_path):
    """A rank beyond the last configuration repeats it; candidates that take none are all timed."""
    few = conv_configs(4096, 64, 64, torch.bfloat16)
    assert len(few) == 2

    def launch(name, ranks):
        for rank in ranks:
            at_rank(few, rank)
        return name

    ranks = {"first": [0], "second": [1], "third": [2], "pair": [1, 2], "library": [], "other library": []}
    timer, calls = fake_timer(dict.fromkeys(ranks, 1.0))
    TimedChoices(tmp_path / "choices.json", "gpu", timer).choose(
        "op", {name: (lambda name=name: launch(name, ranks[name])) for name in ranks}
    )
    assert calls == ["first", "second", "pair", "library", "other library"]


def test_configurations_are_listed_for_all_who_ask():
    few = conv_configs(4096, 64, 64, torch.bfloat16)
    with taken() as outer:
        at_rank(few, 0)
        with taken() as inner:
            at_rank(few, 1)
    at_rank(few, 0)
    assert (outer, inner) == (few, few[1:])


def test_the_error_is_raised_when_all_fail(tmp_path):
    timer, _ = fake_timer({"x": RuntimeError("first"), "y": RuntimeError("second")})
    with pytest.raises(RuntimeError, match="first"):
        TimedChoices(tmp_path / "choices.json", "gpu", timer).choose("op", candidates("x", "y"))


def test_a_winner_that_is_no_longer_a_candidate_is_measured_again(tmp_path):
    path = tmp_path / "choices.json"
    timer, _ = fake_timer({"old": 1.0, "new": 2.0})
    TimedChoices(path, "gpu", timer).choose("op", candidates("old", "new"))
    assert TimedChoices(path, "gpu", timer).choose("op", candidates("new")) == "new"


GOOD = {"winner": "x", "milliseconds": {"x": 1.0, "y": 2}, "errors": {}}
DAMAGED = [
    "{",
    "\0" * 40,
    b"\xff\xfe",
    "[" * 100_000,
    "9" * 10_000,
    [],
    None,
    "text",
    {"gpu": []},
    {"gpu": None},
    *({"gpu": {"op": entry}} for entry in ([], "x", None, 1, {}, {"winner": "x"}, {"milliseconds": {"x": 1.0}})),
    *({"gpu": {"op": {**GOOD, "winner": winner}}} for winner in (None, 1, [], {}, ["x"], "z", "y")),
    *({"gpu": {"op": {**GOOD, "milliseconds": times}}} for times in (None, 1, [1.0], "x", {}, {"y": 2.0})),
    *(
        {"gpu": {"op": {**GOOD, "milliseconds": {"x": time, "y": 2.0}}}}
        for time in (None, "1.0", [], True, -1.0, math.nan, math.inf, 10**400)
    ),
]


@pytest.mark.parametrize("content", DAMAGED, ids=lambda content: repr(content)[:60])
def test_a_damaged_file_is_measured_anew_with_a_warning(content, tmp_path):
    path = tmp_path / "choices.json"
    if not (isinstance(content, (str, bytes)) and content != "text"):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    timer, calls = fake_timer({"x": 1.0, "y": 2.0})
    said = rf"^{re.escape(str(path))} is damaged \([^\n]+\): [^\n]+ timed again [^\n]+ delete it if this comes back$"
    with pytest.warns(UserWarning, match=said):
        choices = TimedChoices(path, "gpu", timer)
    with pytest.warns(UserWarning, match=said):
        assert choices.choose("op", candidates("x", "y")) == "x" and calls == ["x", "y"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert TimedChoices(path, "gpu", timer).choose("op", candidates("x", "y")) == "x" and len(calls) == 2


def test_what_is_sound_in_a_damaged_file_stays(tmp_path):
    path = tmp_path / "choices.json"
    other = {"winner": "y", "milliseconds": {"y": 1.0}, "errors": {"x": "ValueError: no"}}
    path.write_text(json.dumps({"gpu": {"op": [], "sound": GOOD}, "old": 7, "another": {"op": other}}))
    timer, calls = fake_timer({"x": 3.0})
    with pytest.warns(UserWarning, match="no choice under 'op' and 1 more"):
        choices = TimedChoices(path, "gpu", timer)
        assert choices.choose("sound", candidates("x", "y")) == "x" and not calls
        choices.choose("op", candidates("x"))
    written = json.loads(path.read_text())
    assert written.keys() == {"gpu", "another"} and written["another"] == {"op": other}
    assert written["gpu"]["sound"] == GOOD and written["gpu"]["op"]["milliseconds"] == {"x": 3.0}


def test_a_folder_that_cannot_be_written_costs_only_the_memory(tmp_path):
    (tmp_path / "file").write_text("")
    timer, calls = fake_timer({"x": 1.0})
    with pytest.warns(UserWarning, match="cannot be"):
        choices = TimedChoices(tmp_path / "file" / "choices.json", "gpu", timer)
        assert [choices.choose("op", candidates("x")) for _ in range(2)] == ["x", "x"]
    assert calls == ["x"]


def test_the_cache_folder_can_be_set(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTRES_CACHE", str(tmp_path))
    assert choices_path() == tmp_path / "choices.json"
    monkeypatch.delenv("FASTRES_CACHE")
    assert choices_path().parts[-3:] == (".cache", "fastres", "choices.json")
