"""Training and inference on a CPU against the baselines: what is called, and what is made of the times."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import cpu
from fastres.measure import Workload

TINY = Workload("resnet8", 2, 8)


def test_folded_inference_is_the_networks():
    plain, folded = (cpu.Inference(TINY, variant, torch.float32)() for variant in ("eager", "folded"))
    torch.testing.assert_close(folded, plain, rtol=1e-3, atol=1e-3)


def test_convolutions_are_timed():
    seconds = cpu._convolutions(TINY, "fp32", 1)
    assert 0 < seconds["forward"] and 0 < seconds["backward"]


def test_convolutions_flops_are_counted():
    """The network's own count, less its last layer and what the first layer's input would take."""
    counter = FlopCounterMode(display=False)
    model = TINY.build()
    images, _ = TINY.inputs(torch.device("cpu"))
    with counter:
        model(images).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    found = cpu._convolutions(TINY, "fp32", 1)
    convolutions = counts[torch.ops.aten.convolution], counts[torch.ops.aten.convolution_backward]
    assert (found["forward_flops"], found["backward_flops"]) == convolutions


def test_products_rate_is_measured():
    assert cpu._products("fp32", 1) > 1e8


def found():
    """Two precisions; bf16 is twice as fast, ours 1.5 times as the best baseline, 1.2 times as it with kept memory."""
    seconds = {"fp32": 2.0, "bf16": 1.0}
    training = {f"{p}, {t}, default memory": {"median": s} for t, s in seconds.items() for p in ("eager", "compile")}
    training |= {f"eager, {t}, kept memory": {"median": s * 0.8} for t, s in seconds.items()}
    training |= {f"fused, {t}, paged memory": {"median": s / 1.5} for t, s in seconds.items()}
    training["compile, bf16, kept memory"] = {"error": "RuntimeError: no compiler"}
    inference = {k.replace("fused", "folded"): v for k, v in training.items()}
    return {
        "workload": "notebook",
        "training": training,
        "inference": inference,
        "peak_mib": {
            "eager, bf16, kept memory": 200.0,
            "eager, bf16, returned memory": 100.0,
            "fused, bf16, paged memory": 80.0,
            "fused recompute, bf16, paged memory": 60.0,
        },
        "convolutions": {
            "fp32": {"forward": 0.4, "backward": 0.8, "forward_flops": 1e9, "backward_flops": 2e9},
            "bf16": {"forward": 0.2, "backward": 0.4, "forward_flops": 1e9, "backward_flops": 2e9},
        },
        "products": {"fp32": 5e9, "bf16": 1e10},
    }


def test_ours_against_the_best_baseline():
    facts = cpu.summary(found())
    training = facts["training"]
    assert training["best"] == "fused, bf16, paged memory"
    assert training["images_per_second"] == pytest.approx(64 * 1.5)
    assert training["baseline"]["ratio"] == pytest.approx(1.5) and training["baseline"]["name"].endswith(
        "bf16, default memory"
    )
    assert training["baseline with kept memory"]["ratio"] == pytest.approx(1.2)
    assert training["of_the_convolutions"] == pytest.approx(0.6 / (1 / 1.5))
    inference = facts["inference"]["64"]
    assert inference["of_the_convolutions"] == pytest.approx(0.2 / (1 / 1.5))
    assert training["of_the_products"] == pytest.approx(0.3 / (1 / 1.5))
    assert inference["of_the_products"] == pytest.approx(0.1 / (1 / 1.5))
    ratios = {"fused, bf16, paged memory": 0.8, "fused recompute, bf16, paged memory": 0.6}
    assert facts["peak_memory_ratio"] == pytest.approx(ratios)


def test_the_table():
    table = cpu.table([found()])
    assert "notebook, training: fused, bf16 | 96.0 | 1.50 (" in table
    assert "| notebook: fused, bf16, paged memory | 80 | 0.80 | 96.0 |" in table
    assert "| notebook: fused recompute, bf16, paged memory | 60 | 0.60 |  |" in table


def test_the_table_of_inference_alone():
    one = {key: value for key, value in found().items() if key != "training"} | {"peak_mib": {}}
    table = cpu.table([one])
    assert "notebook, inference, batch 64: folded, bf16" in table and "training" not in table and "MiB" not in table
    assert table.startswith("One large matrix product runs at 0.01 TFLOP/s in fp32 and 0.01 TFLOP/s in bf16.")


@pytest.mark.parametrize(
    "line, name, file",
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16", "AMX-BF16", "cpu-amx-bf16.json"),
        ("flags\t\t: fpu avx2 avx512f avx512_bf16", "AVX512-BF16", "cpu-avx512-bf16.json"),
        ("Features\t: fp asimd bf16", "ARM BF16", "cpu-arm-bf16.json"),
    ],
)
def test_each_kind_of_cpu_has_its_result_file(line, name, file, tmp_path):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n")
    assert cpu.instructions(tmp_path / "cpuinfo") == name and cpu.results_of(name, tmp_path) == tmp_path / file
    assert cpu.instructions(tmp_path / "missing") == cpu.platform.machine()


def test_batches_of_inference_have_rows_of_their_own():
    """Results of before have the workload's batch alone; what is measured anew replaces that batch."""
    one = found()
    times = {label: {"median": time["median"] / 32} for label, time in one["inference"].items() if "median" in time}
    measured = {"times": times, "convolutions": {"bf16": {"forward": 0.01, "forward_flops": 1e8}}}
    joined = cpu.joined(one, {"inference": {"1": measured}})
    table = cpu.table([cpu.joined(joined, {"inference": {"1": measured}})])
    assert table.count("notebook, inference, batch 1: folded, bf16 | 48.0 | 1.50 (") == 1
    assert "| notebook, inference, batch 64: folded, bf16 | 96.0 |" in table and "notebook, training: " in table
    assert cpu.summary(joined)["inference"]["1"]["of_the_convolutions"] == pytest.approx(0.01 * 48)


@pytest.mark.parametrize("rate_known", [True, False], ids=["a rate a batch", "one rate a workload"])
def test_each_part_is_divided_by_the_products_rate_of_its_own_time(rate_known):
    """Measured later on a quieter machine: training anew leaves inference as it is, and the other way round."""
    one, slow, fast = found(), {"fp32": 5e9, "bf16": 1e10}, {"fp32": 1e10, "bf16": 2e10}
    if rate_known:
        batch = {"times": one["inference"], "convolutions": one["convolutions"], "products": slow, "commit": "then"}
        one["inference"] = {"64": batch}
    one["commit"] = "then"
    before = cpu.summary(one)
    trained = cpu.joined(one, {"training": one["training"], "products": fast, "commit": "now"})
    after = cpu.summary(trained)
    assert after["inference"] == before["inference"] and trained["inference"]["64"]["commit"] == "then"
    halves = before["training"]["of_the_products"] / 2
    assert after["training"]["of_the_products"] == pytest.approx(halves) and trained["commit"] == "now"
    anew = cpu.joined(one, {"inference": {"64": {**cpu.by_batch(one)["64"], "products": fast, "commit": "now"}}})
    after = cpu.summary(anew)
    assert after["training"] == before["training"] and anew["commit"] == "then"
    halves = before["inference"]["64"]["of_the_products"] / 2
    assert after["inference"]["64"]["of_the_products"] == pytest.approx(halves)


def test_a_small_network_is_measured_part_by_part(monkeypatch, tmp_path):
    monkeypatch.setitem(cpu.WORKLOADS, "tiny", TINY)
    monkeypatch.setattr(cpu, "in_own_process", lambda function, *args: function(*args))
    monkeypatch.setattr(cpu, "_in_turn", lambda kind, workload, runs, *_: {cpu._label(*runs[-1]): workload.batch})
    monkeypatch.setattr(cpu, "_prepare", lambda *_: None)
    monkeypatch.setattr(cpu, "PRODUCT", 64)
    args = cpu.parse(["--kinds", "inference", "--precisions", "fp32", "--batches", "1", "3"])
    parts = list(cpu.measure("tiny", args))
    assert [list(part) for part in parts] == [["workload", "inference"]] * 2
    one, three = (part["inference"][batch] for part, batch in zip(parts, "13"))
    assert one["products"].keys() == {"fp32"} and one["commit"] == three["commit"] != ""
    assert list(one["times"].values()) == [1] and list(three["times"].values()) == [3]
    flops = [of["convolutions"]["fp32"]["forward_flops"] for of in (one, three)]
    assert flops[1] == 3 * flops[0] and one["convolutions"]["fp32"]["backward_flops"] == 0


def test_workloads_are_added_to_those_of_before(tmp_path, monkeypatch, capsys):
    out, commits = tmp_path / "cpu.json", iter(("first", "second", "third"))
    monkeypatch.setattr(cpu, "measure", lambda name, args: [{**found(), "workload": name, "commit": next(commits)}])
    cpu.main(["--workloads", "notebook", "resnet18", "--out", str(out)])
    cpu.main(["--workloads", "resnet18", "--out", str(out), "--add"])
    kept = {one["workload"]: one["commit"] for one in json.loads(out.read_text())["workloads"]}
    assert kept == {"notebook": "first", "resnet18": "third"}
    assert "notebook, training" in capsys.readouterr().out


@pytest.mark.parametrize("seconds, repeats", [(0.012, 17), (0.25, 1)])
def test_short_calls_are_repeated_within_a_turn(seconds, repeats, monkeypatch):
    clock = iter([100.0, 100.0 + seconds])
    monkeypatch.setattr(cpu.time, "perf_counter", lambda: next(clock))
    assert cpu.TURN == 0.2 and cpu._repeats(lambda: None) == repeats
