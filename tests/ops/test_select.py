"""Which implementation runs, and how that is chosen and seen."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from fastres import ops
from fastres.ops import cpu, select
from fastres.ops.select import Primitives, primitives
from fastres.ops.timing import TimedChoices


def chosen_for(x, monkeypatch, interpret="1", **environment):
    """Name of the candidate that ``primitives(x)`` offers, the test-suite's own choice out of the way."""
    monkeypatch.setattr(select, "_forced", None)
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    monkeypatch.delenv("FASTRES_IMPL", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(select, "_primitives", lambda name: name)
    return primitives(x)


def test_a_cpu_takes_cpp_unless_triton_is_interpreted(monkeypatch):
    x = torch.ones(1, 1, 1, 1)
    monkeypatch.setattr(cpu, "unavailable", lambda: None)
    assert chosen_for(x, monkeypatch, interpret="0") == "cpp"
    assert chosen_for(x.bfloat16(), monkeypatch, interpret="0") == "cpp"
    assert chosen_for(x.half(), monkeypatch, interpret="0") == "aten"
    assert chosen_for(x, monkeypatch, interpret="1") == "triton"
    assert chosen_for(x, monkeypatch, interpret="1", FASTRES_IMPL="aten") == "aten"


def test_without_a_compiler_a_cpu_takes_aten(monkeypatch):
    monkeypatch.setattr(cpu, "unavailable", lambda: "no C++ compiler")
    assert chosen_for(torch.ones(1, 1, 1, 1), monkeypatch, interpret="0") == "aten"
    with pytest.raises(RuntimeError, match="'cpp' needs its passes compiled: no C"):
        chosen_for(torch.ones(1, 1, 1, 1), monkeypatch, FASTRES_IMPL="cpp")


@pytest.mark.parametrize("x", [torch.ones(1, 1, 1, 1).double(), torch.ones(0, 1, 1, 1)], ids=["fp64", "empty"])
def test_fp64_and_empty_tensors_always_go_to_aten(x, monkeypatch):
    assert chosen_for(x, monkeypatch, FASTRES_IMPL="triton") == "aten"
    assert chosen_for(x, monkeypatch, FASTRES_IMPL="cpp") == "aten"


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch):
    with pytest.raises(RuntimeError, match="cannot run on a cpu tensor: set TRITON_INTERPRET=1 or choose 'aten'"):
        chosen_for(torch.ones(1, 1, 1, 1), monkeypatch, interpret="0", FASTRES_IMPL="triton")


def test_unknown_names_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="FASTRES_IMPL is 'cuda': choose auto, triton, cpp, aten"):
        chosen_for(torch.ones(1, 1, 1, 1), monkeypatch, FASTRES_IMPL="cuda")
    with pytest.raises(ValueError, match="implementation is 'eager'"):
        with ops.implementation("eager"):
            pass


def test_the_context_manager_ends():
    before = select._forced
    with pytest.raises(KeyError), ops.implementation("auto"):
        assert select._forced == "auto"
        raise KeyError
    assert select._forced == before


def test_selection_tells_what_ran():
    modes = ["aten"] if cpu.unavailable() else ["aten", "cpp", "aten"]
    for mode in modes:
        with ops.implementation(mode):
            ops.global_avg_pool(torch.ones(2, 3, 5, 7))
    assert set(modes) <= set(ops.selection()["global_avg_pool"].split(", "))


def test_a_primitive_that_nobody_has_is_told():
    nobody = Primitives({"aten": SimpleNamespace()})
    with pytest.raises(AttributeError, match="none of aten has the primitive 'transpose'"):
        nobody.transpose()


class Choices:
    """Stands for `TimedChoices`: always the last candidate; remembers the keys."""

    def __init__(self):
        self.keys = []

    def choose(self, key, candidates):
        self.keys.append(key)
        for call in candidates.values():
            call()
        return list(candidates)[-1]

    def known(self, key, candidates):
        return None


def test_each_shape_is_chosen_once(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    choices = Choices()
    first = SimpleNamespace(double=lambda x: ("first", 2 * x), only=lambda x: ("only", x))
    second = SimpleNamespace(double=lambda x: ("second", 2 * x))
    both = Primitives({"first": first, "second": second}, choices)
    for size in (2, 3, 2):
        assert both.double(torch.ones(size))[0] == "second"
    assert both.only(torch.ones(4))[0] == "only"
    assert choices.keys == ["double((2, float32))", "double((3, float32))"]
    assert ops.selection()["double((3, float32))"] == "second" and ops.selection()["only"] == "first"


def test_nothing_is_timed_inside_a_graph_capture(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    choices = Choices()
    spaces = {name: SimpleNamespace(op=lambda x, name=name: name) for name in ("first", "second")}
    assert Primitives(spaces, choices).op(torch.ones(1)) == "first" and not choices.keys


def test_a_graph_captures_what_was_measured_before(monkeypatch, tmp_path):
    spaces = {name: SimpleNamespace(op=lambda x, name=name: name) for name in ("first", "second")}
    times = iter((2.0, 1.0))
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    choices = TimedChoices(tmp_path / "choices.json", "a machine", lambda call: next(times))
    monkeypatch.setattr("fastres.ops.timing.difference", lambda *results: (0.0, None))
    assert Primitives(spaces, choices).op(torch.ones(1)) == "second"
    capturing = True
    later = TimedChoices(tmp_path / "choices.json", "a machine", lambda call: pytest.fail("timed"))
    assert Primitives(spaces, later).op(torch.ones(1)) == "second"
    assert Primitives({"first": spaces["first"], "third": spaces["first"]}, later).op(torch.ones(1)) == "first"
    assert Primitives(spaces, later).op(torch.ones(2)) == "first"


class CurrentDevice:
    """Stands for the current CUDA device of a machine that has several, the first one at the start."""

    def __init__(self, monkeypatch):
        self.index, self.switches = 0, 0
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.index)
        monkeypatch.setattr(torch.cuda, "device", self.switched)

    @contextmanager
    def switched(self, device):
        before, self.index = self.index, torch.device(device).index
        self.switches += 1
        try:
            yield
        finally:
            self.index = before


def test_a_primitive_runs_on_its_tensors_device(monkeypatch):
    """Where there is one candidate, in the timing of several, and in the call of the one that was chosen."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    current = CurrentDevice(monkeypatch)
    seen = []
    spaces = {name: SimpleNamespace(op=lambda x: seen.append(current.index)) for name in ("first", "second")}
    spaces["first"].sole = spaces["first"].op
    for index in (1, 0):
        both = Primitives(spaces, Choices(), torch.device("cuda", index))
        both.op(torch.ones(1))
        both.op(torch.ones(1))
        both.sole(torch.ones(1))
        assert seen == [index] * 5
        seen.clear()
    assert current.index == 0 and current.switches == 3  # none where the device is the current one


def test_an_error_leaves_the_current_device_as_it_was(monkeypatch):
    current = CurrentDevice(monkeypatch)

    def fail(x):
        assert current.index == 1
        raise KeyError

    with pytest.raises(KeyError):
        Primitives({"one": SimpleNamespace(op=fail)}, device=torch.device("cuda", 1)).op(torch.ones(1))
    assert current.index == 0


def test_joint_backward_is_dgrad_and_wgrad():
    from fastres.ops import aten

    x, w, dz = torch.randn(2, 5, 5, 3), torch.randn(4, 3, 3, 3), torch.randn(2, 5, 5, 4)
    coef = aten.finalize(aten.moments(x), None, None, 1e-5)
    y = aten.conv(x, w, 1, (1, 1, 1, 1), coef)[0]
    arguments = (dz, y, torch.randn(3, 4), x, coef, w, 1, (1, 1, 1, 1))
    joint = select._dgrad_and_wgrad(aten.conv_dgrad, aten.conv_wgrad, *arguments)
    torch.testing.assert_close(joint, aten.conv_backward(*arguments))
    assert select._dgrad_and_wgrad(None, None, *arguments, need_dx=False, need_dw=False) == (None, None, None)
