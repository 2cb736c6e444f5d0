"""The timed choice: fastest wins, once, and is remembered on disk."""

import json
import math
import re
import warnings
from functools import partial

import pytest
import torch

from fastres.kernels.configs import Product, at_rank, conv_configs, taken
from fastres.ops.graphs import as_one_graph
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


def test_the_hosts_time_counts_but_for_a_graph(tmp_path):
    """Measured once; an entry of an earlier version, without the host's time, still holds."""
    path = tmp_path / "choices.json"
    timer, calls = fake_timer({"triton": 0.07, "library": 0.06})
    host = {"triton": 0.004, "library": 0.025}
    for made_by in (lambda call: host[call()], None, lambda call: pytest.fail("measured")):
        choices = TimedChoices(path, "gpu", timer, host=made_by)
        for _ in range(2):
            assert choices.choose("conv", candidates("triton", "library")) == "triton"
            assert choices.known("conv", candidates("triton", "library")) == "triton"
            with as_one_graph():
                assert choices.choose("conv", candidates("triton", "library")) == "library"
                with as_one_graph():
                    pass
                assert choices.known("conv", candidates("triton", "library")) == "library"
    assert calls == ["triton", "library"]
    content = json.loads(path.read_text())
    assert content["gpu"]["conv"].pop("host") == host
    path.write_text(json.dumps(content))
    assert TimedChoices(path, "gpu", timer).known("conv", candidates("triton", "library")) == "library"


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
    few = conv_configs(Product(4096, 64, 64, torch.bfloat16))
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
    few = conv_configs(Product(4096, 64, 64, torch.bfloat16))
    with taken() as outer:
        at_rank(few, 0)
        with taken() as inner:
            at_rank(few, 1)
    at_rank(few, 0)
    assert (outer, inner) == (few, few[1:])


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cudaErrorMemoryAllocation"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_too_little_memory_is_a_loss_for_this_process_only(error, tmp_path):
    path = tmp_path / "choices.json"
    times = {"x": error, "y": 5.0}
    timer, calls = fake_timer(times)
    choices = TimedChoices(path, "gpu", timer)
    choices.choose("other", candidates("y"))
    with pytest.warns(UserWarning, match="x ran out of memory in the timing of op: this process takes y, the next one"):
        assert choices.choose("op", candidates("x", "y")) == "y"
    assert choices.choose("op", candidates("x", "y")) == "y" and calls == ["y", "x", "y"]
    assert json.loads(path.read_text())["gpu"].keys() == {"other"}
    times["x"] = 1.0
    assert TimedChoices(path, "gpu", timer).choose("op", candidates("x", "y")) == "x"


def test_a_loss_by_memory_that_is_in_the_file_is_timed_again(tmp_path):
    path = tmp_path / "choices.json"
    lost = {**GOOD, "winner": "y", "milliseconds": {"y": 2.0}, "errors": {"x": "OutOfMemoryError: CUDA out of memory."}}
    path.write_text(json.dumps({"gpu": {"op": lost, "sound": GOOD}}))
    timer, calls = fake_timer({"x": 1.0, "y": 2.0})
    choices = TimedChoices(path, "gpu", timer)
    assert choices.choose("sound", candidates("x", "y")) == "x" and not calls
    assert choices.choose("op", candidates("x", "y")) == "x" and len(calls) == 2
    assert json.loads(path.read_text())["gpu"]["op"]["errors"] == {}


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: an illegal memory access was encountered",
        "Triton Error [CUDA]: misaligned address",
        "CUDA error: unspecified launch failure",
        "CUDA error: device-side assert triggered",
        "CUDA error: the launch timed out and was terminated",
    ],
)
def test_an_error_that_breaks_the_device_is_raised(words, tmp_path):
    timer, calls = fake_timer({"w": 3.0, "x": RuntimeError(words), "y": 1.0})
    with (
        pytest.warns(UserWarning, match="'x' of op, or a kernel before it"),
        pytest.raises(RuntimeError, match=words[-20:]),
    ):
        TimedChoices(tmp_path / "choices.json", "gpu", timer).choose("op", candidates("w", "x", "y"))
    assert calls == ["w", "x"] and not (tmp_path / "choices.json").exists()


def test_an_error_after_which_the_device_does_not_answer_is_raised(tmp_path, monkeypatch):
    def synchronize():
        raise RuntimeError("CUDA error: unknown")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    timer, _ = fake_timer({"x": ValueError("something"), "y": 1.0})
    with pytest.warns(UserWarning, match="broke the CUDA device"), pytest.raises(ValueError, match="something"):
        TimedChoices(tmp_path / "choices.json", "gpu", timer).choose("op", candidates("x", "y"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert TimedChoices(tmp_path / "choices.json", "gpu", timer).choose("op", candidates("x", "y")) == "y"


def results(**values):
    """Candidates that return these, and a timer by which later ones are faster."""
    calls = {name: partial(lambda value: value, value) for name, value in values.items()}
    times = iter(range(10, 0, -1))
    return calls, lambda call: float(next(times))


def test_a_candidate_of_another_result_loses_with_a_warning(tmp_path):
    path, y = tmp_path / "choices.json", torch.randn(2, 8, 8, 16).bfloat16()
    wrong = y.clone()
    wrong[:, -1] = 0
    calls, timer = results(triton=(y, None), library=(wrong, None), near=(y * 1.005, None))
    with pytest.warns(
        UserWarning, match=r"WRONG RESULT: 'library' of conv\(2x8x8x16\): its result\[0\] is further"
    ) as said:
        assert TimedChoices(path, "gpu", timer).choose("conv(2x8x8x16)", calls) == "near"
    assert len(said) == 1
    entry = json.loads(path.read_text())["gpu"]["conv(2x8x8x16)"]
    assert entry["milliseconds"].keys() == {"triton", "near"} and entry["errors"].keys() == {"library"}
    assert 0.2 < entry["differences"]["library"] < 0.5 and 0 < entry["differences"]["near"] < 0.01
    calls, timer = results(triton=(y, None), library=(wrong, None), near=(y, None))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert TimedChoices(path, "gpu", timer).choose("conv(2x8x8x16)", calls) == "near"


def test_a_candidate_of_another_shape_loses(tmp_path):
    path = tmp_path / "choices.json"
    calls, timer = results(triton=torch.ones(4, 2), library=torch.ones(2, 4))
    with pytest.warns(UserWarning, match=r"float32 \[2, 4\] on cpu and not float32 \[4, 2\]"):
        assert TimedChoices(path, "gpu", timer).choose("op", calls) == "triton"
    assert math.isfinite(json.loads(path.read_text())["gpu"]["op"]["differences"]["library"])


def test_the_first_that_runs_is_compared_with(tmp_path):
    def failing():
        raise RuntimeError("no kernel")

    calls, timer = results(second=torch.ones(64), third=torch.zeros(64))
    with pytest.warns(UserWarning, match="compared with 'second'"):
        choices = TimedChoices(tmp_path / "choices.json", "gpu", timer)
        assert choices.choose("op", {"first": failing, **calls}) == "second"


def test_results_of_16_bit_operands_are_compared_as_such(tmp_path):
    """A weight gradient is fp32, but a library rounds it to the operands' dtype before."""
    dw, x = torch.randn(256), torch.ones(1).bfloat16()
    calls = {
        name: partial(lambda x, value: value, x, value) for name, value in (("a", dw), ("b", dw.bfloat16().float()))
    }
    timer = results()[1]
    assert TimedChoices(tmp_path / "choices.json", "gpu", timer).choose("op", calls) == "b"


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
    *({"gpu": {"op": {**GOOD, "host": times}}} for times in (None, 1, [1.0], {"x": "1.0"}, {"x": -1.0})),
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
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert choices_path().parts[-3:] == (".cache", "fastres", "choices.json")
