"""Which implementation runs, and how that is chosen and seen."""

import inspect
from contextlib import contextmanager

import pytest
import torch

from fastres import ops
from fastres.kernels.configs import taken
from fastres.ops import cpu, select
from fastres.ops.backends.aten import Aten
from fastres.ops.backends.cpp import Cpp
from fastres.ops.backends.fake import Fake
from fastres.ops.backends.protocol import Activation, Backend, Convolution, Gradient, Normalised, Shortcut
from fastres.ops.backends.timed import Timed
from fastres.ops.backends.triton import (
    JOINT,
    PASS_CHANNELS,
    STORED_CHANNELS,
    WIDE_CHANNELS,
    Triton,
    TritonVendorWeights,
    Vendor,
    Way,
)
from fastres.ops.graphs import as_one_graph
from fastres.ops.operation import isolated
from fastres.ops.select import backend_for
from fastres.ops.timing import TimedChoices


def chosen_for(x, monkeypatch, interpret="1", **environment):
    """Name of the backend that serves x, the test-suite's own choice out of the way."""
    monkeypatch.setattr(select, "_forced", None)
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    monkeypatch.delenv("FASTRES_IMPL", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return backend_for(x).name


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
    with pytest.raises(ValueError, match="FASTRES_IMPL is 'cuda': choose auto, triton, vendor, cpp, aten"):
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


def test_a_backend_may_be_given():
    class Other(Aten):
        name = "other"

    with ops.implementation(Other()):
        assert backend_for(torch.ones(1, 1, 1, 1)).name == "other"
        assert backend_for(torch.ones(1, 1, 1, 1).double()).name == "aten"


def test_selection_tells_what_ran():
    modes = ["aten"] if cpu.unavailable() else ["aten", "cpp", "aten"]
    for mode in modes:
        with ops.implementation(mode):
            ops.global_avg_pool(torch.ones(2, 3, 5, 7))
    assert set(modes) <= set(ops.selection()["backends"].split(", "))


@pytest.mark.parametrize("backend", [Aten, Cpp, Fake, Triton, Vendor, Timed], ids=lambda kind: kind.__name__)
def test_every_backend_has_every_primitive_with_the_interfaces_arguments(backend):
    for name, method in vars(Backend).items():
        if name.startswith("_") or not inspect.isfunction(method):
            continue
        wanted = list(inspect.signature(method).parameters)[1:]
        own = [one for one in inspect.signature(getattr(backend, name)).parameters if one not in ("self", "rank")]
        assert own == wanted, f"{backend.__name__}.{name}"


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


class Named(Aten):
    """A candidate whose convolutions only tell who ran."""

    def __init__(self, name):
        self.name = name

    def conv(self, activation, conv, residual=None, moments=True):
        return self.name


def timed(choices, *names):
    return Timed(choices, [Named(name) for name in names])


def call_of(size):
    return Activation(torch.ones(1, 1, 1, size)), Convolution(torch.ones(2, 1, 1, size))


def test_each_shape_is_chosen_once(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    choices = Choices()
    both = timed(choices, "first", "second")
    for size in (2, 3, 2):
        assert both.conv(*call_of(size)) == "second"
    first, other = choices.keys
    assert (
        first.startswith("conv(((1x1x1x2, float32), None, relu), ((2x1x1x2, float32), 1, (0, 0, 0, 0), 1)")
        and "x3" in other
    )
    assert both.chosen == {first: "second", other: "second"}


def test_a_graph_has_choices_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr("fastres.ops.timing.difference", lambda *results: (0.0, None))
    times, host = iter((2.0, 1.0)), iter((0.5, 2.0))
    choices = TimedChoices(tmp_path / "c.json", "a machine", lambda call: next(times), host=lambda call: next(host))
    both = timed(choices, "first", "second")
    for _ in range(2):
        assert both.conv(*call_of(1)) == "first"
        with as_one_graph():
            assert both.conv(*call_of(1)) == "second"


def test_nothing_is_timed_inside_a_graph_capture(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    choices = Choices()
    assert timed(choices, "first", "second").conv(*call_of(1)) == "first" and not choices.keys


def test_a_graph_captures_what_was_measured_before(monkeypatch, tmp_path):
    times = iter((2.0, 1.0))
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    choices = TimedChoices(tmp_path / "choices.json", "a machine", lambda call: next(times))
    monkeypatch.setattr("fastres.ops.timing.difference", lambda *results: (0.0, None))
    assert timed(choices, "first", "second").conv(*call_of(1)) == "second"
    capturing = True
    later = TimedChoices(tmp_path / "choices.json", "a machine", lambda call: pytest.fail("timed"))
    assert timed(later, "first", "second").conv(*call_of(1)) == "second"
    assert timed(later, "first", "third").conv(*call_of(1)) == "first"
    assert timed(later, "first", "second").conv(*call_of(2)) == "first"


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


class OnGpu(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    index = 0

    @property
    def device(self):
        return torch.device("cuda", self.index)


def test_an_operation_runs_on_its_tensors_device(monkeypatch):
    current, seen = CurrentDevice(monkeypatch), []
    x = torch.ones(1).as_subclass(OnGpu)
    for OnGpu.index in (1, 0):
        for _ in range(2):
            with isolated(x):
                seen.append(current.index)
    assert seen == [1, 1, 0, 0]
    assert current.index == 0 and current.switches == 2  # none where the device is the current one


def test_an_error_leaves_the_current_device_as_it_was(monkeypatch):
    current = CurrentDevice(monkeypatch)
    x, OnGpu.index = torch.ones(1).as_subclass(OnGpu), 1
    with pytest.raises(KeyError), isolated(x):
        assert current.index == 1
        raise KeyError
    assert current.index == 0


@pytest.mark.parametrize("way", Way)
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("trained", [True, False])
def test_joint_backward_is_dgrad_and_wgrad(kernel, way, trained):
    aten, triton = Aten(), Triton(way=way)
    x, w, dz = torch.randn(2, 5, 5, 3), torch.randn(4, kernel, kernel, 3), torch.randn(2, 5, 5, 4)
    activation = Activation(x, aten.finalize(aten.moments(x), None, None, 1e-5))
    conv = Convolution(w, 1, (kernel // 2,) * 4)
    gradient = Gradient(dz, aten.conv(activation, conv)[0] if trained else None, torch.randn(3, 4))
    ours, theirs = triton.conv_backward(gradient, activation, conv), aten.conv_backward(gradient, activation, conv)
    torch.testing.assert_close((ours[0], ours[1].sum(0), ours[2]), (theirs[0], theirs[1].sum(0), theirs[2]))
    assert triton.conv_backward(gradient, activation, conv, need_dx=False, need_dw=False) == (None, None, None)
    alone = triton.conv_backward(gradient, activation, conv, need_dx=False)
    torch.testing.assert_close(alone[2], theirs[2])


@pytest.mark.parametrize(
    "kernel, channels, ways", [(1, 4, 2), (3, 4, 3), (3, STORED_CHANNELS, 4), (3, PASS_CHANNELS, 3)]
)
def test_ways_that_do_the_same_are_told_from_others(kernel, channels, ways):
    """So that each is timed once: by what it notes beside its tiles."""
    x, dz = torch.randn(1, 3, 3, channels), torch.randn(1, 3, 3, channels)
    w, coef, abc = torch.randn(channels, kernel, kernel, channels), torch.rand(5, channels), torch.rand(3, channels)
    seen = []
    for way in Way:
        with taken() as tiles:
            conv = Convolution(w, 1, (kernel // 2,) * 4)
            Triton(way=way).conv_backward(Gradient(dz, dz, abc), Activation(x, coef), conv)
        seen += [] if tiles in seen else [tiles]
    assert len(seen) == ways


@pytest.mark.parametrize(
    "inputs, outputs, kernel, stride, act, stored",
    [
        (24, WIDE_CHANNELS, 3, 1, "relu", True),
        (16, 32, 3, 1, "relu", False),
        (32, WIDE_CHANNELS, 3, 2, "relu", False),  # more bytes for little time
        (WIDE_CHANNELS, WIDE_CHANNELS, 3, 2, "relu", True),
        (WIDE_CHANNELS, WIDE_CHANNELS, 1, 1, "relu", False),
        (4, 4, 3, 1, "gelu", True),
    ],
)
def test_the_models_choice_for_a_window(inputs, outputs, kernel, stride, act, stored):
    conv = Convolution(torch.randn(outputs, kernel, kernel, inputs), stride, (kernel // 2,) * 4)
    activation = Activation(torch.randn(1, 4, 4, inputs), torch.rand(5, inputs), act)
    dz = torch.randn(1, 4 // stride, 4 // stride, outputs)
    with taken() as noted:
        Triton().conv_backward(Gradient(dz, dz, torch.rand(3, outputs)), activation, conv)
    assert (Way.STORED.value in noted) == stored and (not stored or Way.PASS.value in noted)


def test_one_kernel_makes_both_gradients_of_a_pointwise_convolution():
    """Of what it can: otherwise a kernel for each, with the same result."""
    half = torch.bfloat16
    x, dz, y = (torch.randn(1, 4, 4, 64).to(half) for _ in range(3))
    w, coef, abc = torch.randn(64, 1, 1, 64).to(half), torch.rand(5, 64), torch.rand(3, 64)
    small = Shortcut(torch.randn(1, 2, 2, 64).to(half), None, 2)
    given = dict(gradient=Gradient(dz, y, abc), activation=Activation(x, coef), conv=Convolution(w))
    library, wide = TritonVendorWeights(Vendor()), torch.randn(64, 3, 3, 64).to(half)
    cases = [
        (Triton(), {}, True),
        (Triton(1), {}, True),
        (Triton(), dict(joined=Shortcut(dz)), True),
        (Triton(), dict(activation=Activation(x), end=Normalised(y, coef)), True),
        (Triton(way=Way.ONCE), {}, False),
        (Triton(way=Way.EACH), {}, False),
        (library, {}, False),
        (Triton(), dict(need_dw=False), False),
        (Triton(), dict(joined=small), False),
        (Triton(), dict(activation=Activation(x, coef, "gelu")), False),
        (Triton(), dict(conv=Convolution(wide, 1, (1, 1, 1, 1))), False),
    ]  # fmt: skip
    for backend, changes, joint in cases:
        with taken() as noted:
            dx, sums, dw = backend.conv_backward(**{**given, **changes})
        assert (JOINT in noted) == joint, changes
        once = Triton(way=Way.ONCE).conv_backward(**{**given, **changes})
        torch.testing.assert_close(dx, once[0])
        if sums is not None:
            torch.testing.assert_close(sums.sum(0), once[1].sum(0), rtol=1e-2, atol=1e-2)
        if dw is not None:
            torch.testing.assert_close(dw, once[2], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kernel, act, passes", [(3, "gelu", 1), (1, "gelu", 0), (3, "relu", 0)])
def test_gelu_in_front_of_a_window_is_a_pass(kernel, act, passes, monkeypatch):
    triton, aten, calls = Triton(), Aten(), []
    whole = triton.bn_add_relu
    monkeypatch.setattr(triton, "bn_add_relu", lambda *arguments: (calls.append(arguments), whole(*arguments))[1])
    activation = Activation(torch.randn(2, 5, 5, 3), torch.rand(5, 3), act)
    conv = Convolution(torch.randn(4, kernel, kernel, 3), 1, (kernel // 2,) * 4)
    torch.testing.assert_close(triton.conv(activation, conv)[0], aten.conv(activation, conv)[0])
    assert len(calls) == passes
