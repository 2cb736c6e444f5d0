"""The campaign runs every stage without a GPU, goes on where it stopped, and survives what its cases do."""

import json
import os
import subprocess
import sys

import pytest
import torch

from bench import campaign
from bench.campaign import RESTART, STAGES, read, run_stage
from bench.record import ROOT
from bench.report.__main__ import sections
from bench.report.campaign import CAMPAIGN
from bench.report.plots import plots
from bench.stages import autotune
from bench.stages.tests import read as read_junit
from bench.trace import summary
from bench.workloads import GPU, Setting


def test_dry_run_of_every_stage(tmp_path):
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "OUT": str(tmp_path / "out"),
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("TRITON_INTERPRET", None)
    command = [str(ROOT / "bench" / "campaign.sh"), "--dry-run"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == sorted(f"{stage}.json" for stage in STAGES) and len(files) <= 8
    for stage in STAGES:
        record = json.loads((tmp_path / "out" / f"{stage}.json").read_text())
        assert record["complete"] and record["cases"] and record["versions"]["torch"] == torch.__version__
        assert not [case for case in record["cases"].values() if "error" in case]
    peers = json.loads((tmp_path / "out" / "models.json").read_text())["cases"]["resnet8"]["peers"]
    assert {"eager NCHW", "eager", "compile", "fused", "fused compile"} <= peers.keys()
    first = peers["eager"]["first_loss"]
    assert all(figures["first_loss"] == pytest.approx(first, rel=0.02) for figures in peers.values())
    assert not any("error" in figures for figures in peers.values())

    again = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert again.stdout.count("complete already") == len(STAGES)

    assert CAMPAIGN.keys() <= sections(tmp_path, tmp_path / "out").keys()
    pictures = plots(tmp_path / "out")
    assert len(pictures) == 3 and all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


def test_a_stage_goes_on_where_it_stopped(tmp_path):
    path, ran = tmp_path / "models.json", []

    def case(name):
        def measure():
            ran.append(name)
            return {"value": len(ran)}

        return measure

    cases = {name: case(name) for name in ("a", "b", "c")}
    assert run_stage(path, lambda: cases, -1.0, lambda: True) == 0
    record = json.loads(path.read_text())
    assert ran == [] and not record["complete"] and "before case 'a'" in record["stopped"]
    assert run_stage(path, lambda: {"a": cases["a"]}, 60, lambda: True) == 0
    assert run_stage(path, lambda: cases, 60, lambda: True) == 0
    record = json.loads(path.read_text())
    assert ran == ["a", "b", "c"] and record["complete"] and record["stopped"] is None
    assert [case["value"] for case in record["cases"].values()] == [1, 2, 3]


def test_a_case_that_raises_leaves_its_error_and_the_rest_is_measured(tmp_path):
    def broken():
        raise ValueError("no such layout")

    assert run_stage(tmp_path / "s.json", lambda: {"a": broken, "b": dict}, 60, lambda: True) == 0
    record = json.loads((tmp_path / "s.json").read_text())
    assert (
        record["cases"]["a"]["error"] == "ValueError: no such layout" and "error" not in record["cases"]["b"]
    )
    assert record["complete"]


def test_a_dead_device_asks_for_a_new_process(tmp_path):
    path = tmp_path / "s.json"
    assert run_stage(path, lambda: {"a": dict, "b": dict}, 60, lambda: False) == RESTART
    assert list(read(path)["cases"]) == ["a"] and not read(path)["complete"]


def test_a_case_that_takes_its_process_down_is_left_out_in_the_end(tmp_path):
    path, ran = tmp_path / "s.json", []

    def deadly():
        ran.append(1)
        raise SystemExit(9)

    for _ in range(campaign.ATTEMPTS):
        with pytest.raises(SystemExit):
            run_stage(path, lambda: {"a": deadly, "b": dict}, 60, lambda: True)
    assert run_stage(path, lambda: {"a": deadly, "b": dict}, 60, lambda: True) == 0
    assert len(ran) == campaign.ATTEMPTS
    assert "the process ended" in read(path)["cases"]["a"]["error"] and "b" in read(path)["cases"]


def test_a_process_that_hangs_or_dies_is_noted(tmp_path, monkeypatch):
    args = campaign.parse(["--out", str(tmp_path), "--seconds", "2"])
    monkeypatch.setattr(campaign, "RESTARTS", 2)
    status, tail, killed = campaign._stream(
        [sys.executable, "-c", "import time; time.sleep(60)"], dict(os.environ), 1
    )
    assert killed and status != 0
    monkeypatch.setattr(campaign, "_stream", lambda *_: (7, "out of luck", False))
    campaign._supervise("models", tmp_path / "models.json", args, {})
    assert "given up after 2 processes" in read(tmp_path / "models.json")["stopped"]
    assert "ended with 7: out of luck" in read(tmp_path / "models.json")["stopped"]


def test_pytest_results_are_read(tmp_path):
    (tmp_path / "r.xml").write_text(
        '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1"><testcase classname="a" name="t1"/>'
        '<testcase classname="a" name="t2"><failure message="assert 1 == 2"/></testcase>'
        '<testcase classname="a" name="t3"><skipped/></testcase></testsuite></testsuites>'
    )
    found = read_junit(tmp_path / "r.xml")
    assert (found["passed"], found["failures"], found["skipped"]) == (1, 1, 1)
    assert found["failed"] == [{"test": "a::t2", "message": "assert 1 == 2"}]


def test_trace_counts_kernels_and_their_own_time():
    events = [
        {"cat": "kernel", "name": "gemm", "ts": 0, "dur": 5, "pid": 0, "tid": 7},
        {"cat": "kernel", "name": "gemm", "ts": 10, "dur": 3, "pid": 0, "tid": 7},
        {"cat": "gpu_memcpy", "name": "copy", "ts": 20, "dur": 1, "pid": 0, "tid": 7},
        {"cat": "cpu_op", "name": "outer", "ts": 0, "dur": 10, "pid": 1, "tid": 1},
        {"cat": "cpu_op", "name": "inner", "ts": 2, "dur": 4, "pid": 1, "tid": 1},
        {"cat": "cpu_op", "name": "inner", "ts": 6, "dur": 1, "pid": 1, "tid": 2},
    ]
    found = summary(events, gpu=True, top=5)
    assert found["launches"] == 2 and found["copies"] == 1 and found["seconds"] == pytest.approx(8e-6)
    assert found["top"] == [{"name": "gemm", "count": 2, "seconds": pytest.approx(8e-6)}]
    own = {top["name"]: top["seconds"] for top in summary(events, gpu=False, top=5)["top"]}
    assert own == {"outer": pytest.approx(6e-6), "inner": pytest.approx(5e-6)}


def test_a_gpu_campaign_names_every_network_and_peer():
    setting = Setting(torch.device("cuda"), torch.bfloat16, False, "synthetic", ROOT, 1.0)
    assert setting.workloads().keys() == GPU.keys()
    assert {"compile graphs", "compile max-autotune", "library", "fused graph"} <= set(
        setting.peers("resnet50 224")
    )
    assert not [peer for peer in setting.peers("preact_resnet1001") if "compile" in peer]
    assert {one.batch for one in setting.sweeps().values()} == {128, 256, 1024, 2048}


def test_timed_choices_outlive_their_machine(tmp_path, monkeypatch):
    setting = Setting(torch.device("cuda"), torch.bfloat16, False, "synthetic", tmp_path, 1.0)
    monkeypatch.setenv("FASTRES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(autotune, "machine_key", lambda device: "a GPU")
    result, choice = tmp_path / "autotune.json", {"winner": "library", "milliseconds": {"library": 1.0}}
    autotune.restore(setting, result)
    assert not (tmp_path / "cache").exists()
    result.write_text(json.dumps({"cases": {"net": {"choices": {"conv(8x8)": choice}}, "broken": {"error": "no"}}}))
    for _ in range(2):
        autotune.restore(setting, result)
        assert json.loads((tmp_path / "cache" / "choices.json").read_text()) == {"a GPU": {"conv(8x8)": choice}}
        result.write_text(json.dumps({"cases": {"net": {"choices": {"other": choice}}}}))
