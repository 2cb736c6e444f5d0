"""Every variant trains the same network, and `fastres bench` says what went wrong in one line."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from bench import stand_ins
from fastres import cli
from fastres.measure import VARIANTS, Step, Workload, command, timing
from fastres.measure.command import measure_steps
from fastres.ops import implementation, select
from fastres.ops.backends.vendor import VendorConvolutions

CPU = torch.device("cpu")
SMALL = Workload("resnet8", 4, 8)


@pytest.fixture(autouse=True)
def aten_only(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_train_alike(variant):
    """Step for step, also while graphs are warmed up and recorded."""
    with stand_ins.on_a_cpu():
        reference, step = (Step(SMALL, name, CPU, torch.float32, backend="eager") for name in ("eager NCHW", variant))
        expected, found = ([one().item() for _ in range(6)] for one in (reference, step))
    assert found == pytest.approx(expected, rel=1e-3) and expected[0] != expected[5]
    for ours, theirs in zip(step.model.parameters(), reference.model.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("variant", ["eager", "fused graph", "compile graphs"])
def test_the_first_loss_is_the_first_steps(variant):
    with stand_ins.on_a_cpu():
        expected = Step(SMALL, "eager", CPU, torch.float32)().item()
        step, calls = Step(SMALL, variant, CPU, torch.float32, backend="eager"), []
        assert step.settle(lambda: calls.append(step.model.fc.weight.clone())).item() == pytest.approx(
            expected, rel=1e-5
        )
        found = measure_steps(SMALL, [variant], CPU, torch.float32, rounds=1, warmup=1, backend="eager")
    assert found["variants"][variant]["first_loss"] == pytest.approx(expected, rel=1e-5)
    assert torch.equal(calls[0], step.model.fc.weight) == (variant == "eager")


def test_convolutions_of_the_library_are_timed_while_variants_run(monkeypatch):
    seen = []
    step = Step(SMALL, "eager", CPU, torch.float32)
    monkeypatch.setattr(step, "_run", lambda: seen.append(torch.backends.cudnn.benchmark))
    for before in (False, True):
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
        step()
        assert torch.backends.cudnn.benchmark == before
    assert seen == [True, True]


def test_a_gpu_is_the_current_device_while_it_is_measured(monkeypatch):
    current = ["cuda:0"]

    @contextmanager
    def device(which):
        before, current[0] = current[0], str(which)
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "device", device)
    seen = []
    monkeypatch.setattr(command, "_measure_steps", lambda *_: seen.append(current[0]))
    measure_steps(SMALL, ["eager"], torch.device("cuda:1"), torch.float32)
    monkeypatch.setattr(timing, "_interleaved", lambda *_: seen.append(current[0]))
    timing.interleaved({}, torch.device("cuda:1"))
    assert seen == ["cuda:1", "cuda:1"] and current == ["cuda:0"]


def test_a_variant_that_fails_leaves_its_error(monkeypatch):
    found = measure_steps(SMALL, ["fused graph", "eager"], CPU, torch.float32, rounds=1, warmup=1)
    assert "error" in found["variants"]["fused graph"]
    eager = found["variants"]["eager"]
    assert eager["images_per_second"] == pytest.approx(4 / eager["seconds"]["median"])
    assert eager["tflops"] == pytest.approx(found["flops"] / eager["seconds"]["median"] / 1e12)


def test_the_library_variant_takes_the_vendors_convolutions(monkeypatch):
    """The device is a stand-in here: what counts is which backend is picked."""
    on_gpu = SimpleNamespace(device=torch.device("cuda:0"), dtype=torch.bfloat16, numel=lambda: 1)
    with implementation(VARIANTS["vendor"].implementation):
        backend = select.backend_for(on_gpu)
    assert backend.name == "vendor" and isinstance(backend, VendorConvolutions)


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.implementation in select.MODES])
def test_other_variants_force_what_they_name(name):
    with implementation(VARIANTS[name].implementation):
        assert select._forced == VARIANTS[name].implementation
    with implementation("aten"), implementation("auto"):
        assert select._forced == "auto"


def test_bench_prints_and_writes(tmp_path, capsys):
    options = "bench --model resnet8 --batch-size 4 --image-size 8 --device cpu --precision fp32 --rounds 2".split()
    assert cli.main([*options, "--variants", "eager", "fused", "--json", str(tmp_path / "b.json")]) == 0
    printed, found = capsys.readouterr().out, json.loads((tmp_path / "b.json").read_text())
    assert "resnet8, training, batch 4, 8x8, float32, CPU" in printed and "1.00x" in printed
    assert list(found["variants"]) == ["eager", "fused"] and found["flops"] == SMALL.flops()


def test_bench_takes_a_network_of_ones_own(tmp_path, monkeypatch, capsys):
    (tmp_path / "own_network.py").write_text(
        "from torch import nn\n\ndef network():\n"
        "    return nn.Sequential(nn.Conv2d(3, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    options = (
        "bench --model own_network:network --batch-size 4 --image-size 8 --device cpu --rounds 1 --variants".split()
    )
    assert cli.main([*options, "eager"]) == 0
    assert cli.main([*options, "fused"]) == 2
    assert "no block to fuse" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--model", "resnet9"], "unknown model 'resnet9'"),
        (["--model", "torch.nn:Nothing"], "cannot be made"),
        (["--model", "torch.nn:Linear"], "cannot be made"),
        (["--model", "builtins:dict"], "makes a dict, not a torch.nn.Module"),
        (["--variants", "fastest"], "unknown variant 'fastest'"),
        (["--variants", "fused graph", "--device", "cpu"], "needs a GPU"),
        (["--batch-size", "1"], "make it at least 2"),
    ],
)
def test_bad_options_end_in_one_line(options, message, capsys):
    assert cli.main(["bench", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
