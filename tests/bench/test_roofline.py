"""Predictions follow from bytes, operations and launches; results become tables."""

import json

import pytest
import torch
import triton
from torch import nn

from bench import count_triton, growth, roofline
from bench.blocks import Part, fused, parts_of, train
from bench.report import common, counted, single
from bench.roofline import Launch, Machine, convolution_flops, fused_step, predict, with_flops
from bench.tables import fill
from bench.traffic import StepTraffic, as_record
from fastres.measure import Workload
from fastres.reference.resnet import Bottleneck, conv1x1

MACHINE = Machine(bandwidth=1e12, rate=1e14, launch=1e-6)


def test_a_launch_takes_the_longer_of_bytes_and_operations():
    assert Launch("copy", 10**9, 0).seconds(MACHINE) == pytest.approx(1e-3 + 1e-6)
    assert Launch("conv", 10**6, 10**12).seconds(MACHINE) == pytest.approx(1e-2 + 1e-6)
    found = predict([Launch("copy", 10**9, 0)] * 3 + [Launch("conv", 10**6, 10**11)], MACHINE)
    assert found["seconds"] == pytest.approx(4e-3 + 4e-6) and found["launches"] == 4
    assert found["bandwidth_bound"] == pytest.approx(3 / 4, rel=0.01)


def bottleneck():
    shortcut = nn.Sequential(conv1x1(8, 16, 2), nn.BatchNorm2d(16))
    return Part("layer1.0", nn.Sequential(Bottleneck(8, 4, 2, shortcut)), (8, 6, 6))


def test_convolutions_find_their_operations():
    flops = [one for one, _ in convolution_flops(bottleneck(), 5)]
    expected = [6 * 6 * 8 * 4, 3 * 3 * 9 * 4 * 4, 3 * 3 * 4 * 16, 3 * 3 * 8 * 16]  # in order of execution
    assert flops == [2 * 5 * products for products in expected]

    names = (
        ["convolution"] * 4 + ["native_batch_norm"] + ["convolution_backward dgrad", "convolution_backward wgrad"] * 4
    )
    launches = with_flops([{"kernel": n, "loaded": 2, "stored": 1} for n in names], convolution_flops(bottleneck(), 5))
    assert [one.flops for one in launches if one.kernel == "convolution"] == flops
    assert [one.flops for one in launches if "dgrad" in one.kernel] == flops[::-1]
    assert sum(one.flops for one in launches) == 3 * sum(flops) and launches[4].flops == 0 and launches[0].bytes == 3

    joint = ["torch.ops.aten.convolution"] * 4 + ["torch.ops.aten.convolution_backward.default"] * 4
    launches = with_flops([{"kernel": n, "loaded": 2, "stored": 1} for n in joint], convolution_flops(bottleneck(), 5))
    assert sum(one.flops for one in launches) == 3 * sum(flops)


@pytest.mark.parametrize("count", [3, 5])
def test_another_number_of_convolutions_is_an_error(count):
    kernels = [{"kernel": "convolution", "loaded": 1, "stored": 1}] * count
    with pytest.raises(ValueError):
        with_flops(kernels, convolution_flops(bottleneck(), 1))


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="counted in the interpreter only")
def test_a_fused_step_has_its_own_operations():
    part = bottleneck()
    convolutions, module = convolution_flops(part, 3), fused(part)
    launches = count_triton.traffic(lambda n: train(module, part.images(n, torch.float32), torch.float32), 3)
    counted = as_record(StepTraffic(part, eager=[], compiled=[], launches=launches, other=[], saved={}))
    step = {launch.flops for launch in fused_step(counted, convolutions)}
    assert step == {0, *(flops for flops, _ in convolutions)}
    with pytest.raises(ValueError, match="other operations than"):
        fused_step(counted, convolutions[1:])


def counted_resnet20(tmp_path):
    def kernels(forward, backward, convolutions, factor):
        halves = [f"{backward} {half}" for _ in range(convolutions) for half in ("dgrad", "wgrad")]
        return [{"kernel": k, "loaded": factor * 10**6, "stored": 0} for k in [forward] * convolutions + halves]

    stages = []
    for part in parts_of("resnet20", 32):
        n = len([m for m in part.modules.modules() if isinstance(m, nn.Conv2d)])
        eager = kernels("convolution", "convolution_backward", n, 3)
        if part.name == "stem":
            eager = [kernel for kernel in eager if "dgrad" not in kernel["kernel"]]
        flops = sum(one * (2 + needed) for one, needed in convolution_flops(part, 8))
        fused = [{"kernel": "all in one", "loaded": 10**6, "stored": 0, "flops": flops}]
        moved = {"eager": 4e6, "compiled": 2e6, "fused": 1e6}
        whole = {
            "part": part.name,
            "blocks": part.blocks,
            "counted": part.blocks,
            "input": part.shape,
            "saved": dict(eager=4, fused=3, recompute=2) if stages else dict(eager=0, fused=0, recompute=0),
            "moved": moved,
            "eager": eager,
            "compiled": eager,
            "launches": fused,
            "other": [],
        }
        stages.append([whole, whole])
    path = tmp_path / "traffic.json"
    networks = {"resnet20": {"model": "resnet20", "image": 32, "options": {}, "batch": 8, "stages": stages}}
    record = {"dtype": "bfloat16", "commit": "abc", "networks": networks}
    path.write_text(json.dumps(record))
    return path


def test_predictions_are_written_and_compared_with_measurements(tmp_path, capsys):
    campaign = tmp_path / "h100"
    campaign.mkdir()
    cases = {"copy": {"gb_per_second": 1000.0}, "matmul bfloat16": {"tflops": 100.0}}
    (campaign / "environment.json").write_text(json.dumps({"device": "NVIDIA H100", "cases": cases}))
    case = {
        "model": "resnet20",
        "image_size": 32,
        "batch": 16,
        "variants": {"fused": {"seconds": {"median": 1.0}}},
    }
    (campaign / "models.json").write_text(json.dumps({"device": "NVIDIA H100", "cases": {"resnet20": case}}))
    out = tmp_path / "roofline.json"
    roofline.main(["--traffic", str(counted_resnet20(tmp_path)), "--results", str(tmp_path), "--out", str(out)])
    printed, found = capsys.readouterr().out, json.loads(out.read_text())
    assert printed.startswith("Predictions") and found["kind"] == "prediction"
    for gpu in ("A100", "H100", "H200"):
        kinds = found["predictions"]["resnet20"][gpu]
        assert kinds["eager"]["seconds"] > kinds["fused"]["seconds"] > 0
    (one,) = found["compared"]
    assert (one["variant"], one["batch"], one["measured"]) == ("fused", 16, 1.0)
    text = counted.roofline_section(out)
    assert text.startswith("**Lower bounds, not measurements**") and text.count("resnet20") == 3


def test_counts_become_tables(tmp_path):
    counted_resnet20(tmp_path)
    lines = counted.traffic_section(tmp_path).splitlines()
    assert "static count, commit abc" in lines[0]
    assert lines[4].endswith("| 4 | 2 | 1 | 0.25 | 0.50 |  |  |")
    assert lines[-1] == "| all | 10 |  | 16 | 8 | 4 | 0.25 | 0.50 | 0.75 | 0.50 |"
    assert counted.bytes_an_image(tmp_path)["resnet20 32"] == {"eager": 2e6, "compile": 1e6, "fused": 5e5}


def test_compiled_code_becomes_tables(tmp_path):
    """Each Triton with what it covers; by kernel that of the newest. What did not compile may not be shipped."""
    row = {"kernel": "conv", "arch": 90, "planned": "bf16", "first": True, "spills": 0, "faults": [], "share": None}
    rows = [{**row, "registers": n, "shared": 1000 * n, "tensor_cores": {"HGMMA": n}} for n in (64, 128)]
    rows[0]["share"] = 0.5
    other = {**rows[0], "arch": "gfx942", "registers": 99, "tensor_cores": {"MFMA": 4}, "share": None}
    count = {"arch": 90, "precision": "bf16", "configurations": "first", "compiled": 3, "of": 3}
    counts = [{**count, "arch": "gfx942", "compiled": 1, "of": 4}, {**count, "precision": "fp16", "compiled": 0}, count]
    record = {"coverage": counts, "rows": [*rows, other, {**row, "faults": ["did not compile"]}]}
    for version, found in (("3.10.0", record), ("3.8.0", {"coverage": [count], "rows": rows[:1]})):
        path = tmp_path / f"aot-{version}.json"
        path.write_text(json.dumps({"versions": {"triton": version}, **found}))
    assert counted.machine_code_section(tmp_path).splitlines()[2:] == [
        "| conv | sm_90 | 2 | 64 to 128 | 0 | 128 | HGMMA | 50% of 1 | 1 |",
        "| conv | gfx942 | 1 | 99 to 99 | 0 | 64 | MFMA |  | 0 |",
    ]
    assert counted.architectures_section(tmp_path).splitlines()[2:] == [
        "| sm_90 | bf16 | first | 3.8.0 | 3 of 3 | 64 to 64 | 0 | 64 | HGMMA | 50% of 1 | 0 |",
        "| sm_90 | bf16 | first | 3.10.0 | 3 of 3 | 64 to 128 | 0 | 128 | HGMMA | 50% of 1 | 1 |",
        "| gfx942 | bf16 | first | 3.10.0 | 1 of 4 | 99 to 99 | 0 | 64 | MFMA |  | 0 |",
        "| sm_90 | fp16 | first | 3.10.0 | 0 of 3 |  |  |  |  |  |  |",
    ]
    assert counted.machine_code_section(tmp_path / "nowhere") is None


def test_growth_measures_its_points(tmp_path, monkeypatch):
    monkeypatch.delenv(
        "TRITON_INTERPRET", raising=False
    )  # the measuring processes are to run ATen, not interpreted kernels
    out = tmp_path / "growth.json"
    options = "--batches --depths 20 --depth-batch 2 --resolutions --rounds 1 --precision fp32".split()
    growth.main([*options, "--out", str(out)])
    (point,) = json.loads(out.read_text())["points"]
    assert (point["axis"], point["value"]) == ("depth", 20) and point["variants"].keys() == {"eager", "fused"}
    for figures in point["variants"].values():
        assert figures["images_per_second"] == pytest.approx(2 / figures["seconds"]["median"])
        assert figures["peak_mib"] >= figures["idle_mib"] > 0
    assert "resnet20, batch 2, 32 pixels" in single.growth_section(out)


def test_sections_of_the_readme_are_filled_and_others_left():
    text = "a\n<!-- bench:models -->\nold\n<!-- /bench:models -->\nb <!-- bench:memory -->kept<!-- /bench:memory -->"
    filled = fill(text, {"models": "new"})
    assert filled == text.replace("old", "new")
    assert fill(filled, {"models": "new"}) == filled


def test_the_operations_of_a_step_are_counted_from_shapes():
    one = Workload("resnet20", 4, 32)
    forward = one.batch * 2 * 40.55e6  # published: 41 M multiply-adds an image
    assert one.flops() == pytest.approx(3 * forward, rel=0.02)
    assert torch.equal(one.build().conv1.weight, one.build().conv1.weight)


def test_a_busy_machine_is_told():
    assert "load average 10 for 2 threads" in common.busy(10.2, 2)
    assert common.busy(1.5, 2) == common.busy(None, 2) == ""
