"""The campaign runs every stage without a GPU, goes on where it stopped, and survives what its cases do."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from datetime import date, timedelta

import pytest
import torch

from bench import archive, campaign, merge
from bench.campaign import RESTART, read, run_stage
from bench.record import ROOT
from bench.report.__main__ import sections
from bench.report.campaign import CAMPAIGN, speeds_section
from bench.report.common import networks
from bench.report.plots import plots
from bench.slices import SLICES, STAGES, Part
from bench.stages import autotune, models
from bench.stages import tests as stage_tests
from bench.stages.tests import read as read_junit
from bench.trace import in_order, summary
from bench.workloads import GPU, Setting
from fastres.errors import FastresError
from fastres.measure import VARIANTS

NETWORK = "resnet smallest"


@pytest.fixture(scope="module")
def slices(tmp_path_factory):
    """Folders that a dry run of every slice brought back, each of which went on from the earlier ones."""
    folder = tmp_path_factory.mktemp("campaign")
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        **{variable: str(folder / "caches" / name) for variable, name in campaign.CACHES.items()},
    }
    folders = []
    for number in SLICES:
        if number == 3:  # as on a machine that starts anew
            shutil.rmtree(folder / "caches" / "triton")
        command = [str(ROOT / "bench" / "campaign.sh"), "--dry-run", "--slice", str(number)]
        command += ["--resume", *map(str, folders)] * bool(folders)
        out = folder / str(number)
        done = subprocess.run(command, env={**environment, "OUT": str(out)}, capture_output=True, text=True, cwd=folder)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
        folders.append(out)
    return folders


def cases_of(folder, stage):
    return json.loads((folder / f"{stage}.json").read_text())["cases"]


def test_slices_bring_back_few_files(slices):
    for number, folder in enumerate(slices, 1):
        files = list(folder.iterdir())
        assert {part.stage for part in SLICES[number].parts} <= {file.stem for file in files}
        assert len(files) <= 8 and all(file.is_file() and file.stat().st_size < 16 * 2**20 for file in files)
        assert all(re.fullmatch("[A-Za-z0-9._-]+", file.name) for file in files)


def test_slices_measure_every_variant_with_the_compilers_that_a_gpu_takes(slices):
    third, last = (cases_of(slices[number - 1], "models") for number in (3, 6))
    assert list(third) == [f"{NETWORK} | fused", f"{NETWORK} | compile"]
    assert {group.split(" | ")[1] for group in last} == {*models.GROUPS, *models.SWEEP_GROUPS}
    assert {variant for case in last.values() for variant in case["variants"]} == VARIANTS.keys()
    for name, case in last.items():
        first = case["variants"]["eager"]["first_loss"]
        for variant, figures in case["variants"].items():
            assert "error" not in figures, (name, variant, figures)
            assert figures["first_loss"] == pytest.approx(first, rel=0.02), (name, variant)


def test_slices_go_on_from_what_earlier_ones_brought_back(slices):
    third, last = (cases_of(slices[number - 1], "models") for number in (3, 6))
    assert all(last[name] == case for name, case in third.items())
    assert cases_of(slices[2], "autotune") == cases_of(slices[1], "autotune")
    assert [path.name for path in archive.of(slices[1])] == ["triton-0.tar.xz"]
    kernels = list((slices[0].parent / "caches" / "triton").glob("*/*.cubin"))
    assert len(kernels) == 2 and cases_of(slices[1], "precompile")[NETWORK]["compiled"] == 2


def test_slices_merge_into_what_the_report_reads(slices, tmp_path):
    out = tmp_path / "merged"
    assert merge.main([*map(str, slices), "--out", str(out)]) == 0
    assert {path.stem for path in out.glob("*.json")} == set(STAGES) and archive.of(out)
    for stage in STAGES:
        record = json.loads((out / f"{stage}.json").read_text())
        assert record["complete"] and record["cases"] and record["versions"]["torch"] == torch.__version__, stage
        assert not [case for case in record["cases"].values() if "error" in case]
    found = sections(tmp_path, out)
    assert CAMPAIGN.keys() <= found.keys()
    header = speeds_section(out).splitlines()[2]
    assert all(f" {variant} |" in header for variant in VARIANTS if variant != "eager")
    pictures = plots(out)
    assert len(pictures) == 3 and all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


def test_variants_of_several_cases_are_compared_within_their_own():
    def case(**seconds):
        return {"variants": {variant: {"seconds": {"median": time}} for variant, time in seconds.items()}}

    cases = {
        "net | fused": case(eager=2.0, fused=1.0),
        "net | compile": case(eager=4.0, fused=3.0, compile=2.0),
        "net | broken": {"error": "no"},
        "other": case(eager=1.0),
    }
    cases["net | fused"]["variants"]["compile"] = {"error": "no"}
    found = networks({"cases": cases})
    assert {name: list(one["variants"]) for name, one in found.items()} == {
        "net": ["eager", "fused", "compile"],
        "other": ["eager"],
    }
    variants = found["net"]["variants"]
    assert (variants["fused"]["speed"], variants["compile"]["speed"]) == (2.0, 2.0)


def record(date, cases, complete=False, device="a GPU", **more):
    return {"device": device, "date": date, "cases": cases, "complete": complete, "stopped": "late", **more}


def test_merged_results_are_the_later_ones_that_did_not_fail():
    early = record("2026-01-01T10:00:00", {"a": {"n": 1}, "b": {"error": "x"}, "c": {"n": 1}}, attempts={"d": 1})
    late = record("2026-01-01T11:00:00", {"a": {"n": 2}, "b": {"n": 2}, "c": {"error": "y"}}, attempts={"d": 2, "b": 1})
    for order in ([early, late], [late, early]):
        found = merge.merged(order)
        assert found["cases"] == {"a": {"n": 2}, "b": {"n": 2}, "c": {"n": 1}}
        assert found["date"] == late["date"] and found["attempts"] == {"d": 2}
        assert not found["complete"] and found["stopped"] == "late"
    whole = merge.merged([late, early | {"complete": True}])
    assert whole["complete"] and whole["stopped"] is None
    with pytest.raises(FastresError, match="several devices are not one set: a GPU, cpu"):
        merge.merged([early, record("2026-01-02", {}, device="cpu")])


def test_merging_nothing_ends_in_one_line(tmp_path, capsys):
    assert merge.main([str(tmp_path)]) == 2
    assert "name folders of slices" in capsys.readouterr().err


def test_a_packed_cache_is_found_elsewhere(tmp_path):
    cache, key = tmp_path / "cache", "A" * 52
    names = {name: str(cache / key / name) for name in ("k.cubin", "k.json", "k.ptx")}
    (cache / key).mkdir(parents=True)
    for name in names:
        (cache / key / name).write_bytes(name.encode())
    (cache / key / "__grp__k.json").write_text(json.dumps({"child_paths": names}))
    assert archive.pack(cache, tmp_path / "out")["packed"] == 1
    other = tmp_path / "other"
    assert archive.unpack(archive.of(tmp_path / "out"), other) == 3
    assert archive.unpack(archive.of(tmp_path / "out"), other) == 0
    group = json.loads((other / key / "__grp__k.json").read_text())["child_paths"]
    assert group["k.cubin"] == str(other / key / "k.cubin") and (other / key / "k.cubin").read_bytes() == b"k.cubin"
    assert not (other / key / "k.ptx").exists()


def test_archives_stay_within_their_limits(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "LIMIT", 40_000)
    monkeypatch.setattr(archive, "PIECE", 100_000)
    for number in range(20):
        (tmp_path / "cache" / str(number)).mkdir(parents=True)
        (tmp_path / "cache" / str(number) / "k.cubin").write_bytes(os.urandom(10_000))
    found = archive.pack(tmp_path / "cache", tmp_path / "out")
    sizes = [path.stat().st_size for path in archive.of(tmp_path / "out")]
    assert found["folders"] == 20 and 6 <= found["packed"] < 20 and found["bytes"] == sum(sizes)
    assert len(sizes) == archive.FILES and max(sizes) <= 40_000
    assert archive.unpack(archive.of(tmp_path / "out"), tmp_path / "new") == found["packed"]


def test_a_damaged_archive_is_left_out(tmp_path, capsys):
    (tmp_path / "triton-0.tar.xz").write_bytes(b"no archive")
    assert archive.unpack(archive.of(tmp_path), tmp_path / "cache") == 0
    assert "cannot be read" in capsys.readouterr().out


def test_only_the_cases_of_a_part_are_measured(tmp_path):
    path, cases = tmp_path / "models.json", dict.fromkeys(("net | fused", "net | compile", "deep | fused"), dict)
    for pattern, done in (("net | fused", 1), ("net*", 2), ("*", 3)):
        assert run_stage(path, lambda: cases, 60, lambda: True, Part("models", (pattern,))) == 0
        found = read(path)
        assert len(found["cases"]) == done and found["complete"] == (done == 3) and found["stopped"] is None


@pytest.mark.parametrize("share, counted", [(0.1, True), (0.9, False)])
def test_a_case_that_was_cut_off_for_having_begun_late_may_try_again(tmp_path, monkeypatch, share, counted):
    now = iter([0.0, *[share * 100] * 9])
    monkeypatch.setattr(campaign.time, "monotonic", lambda: next(now))

    def killed():
        raise SystemExit(9)

    path = tmp_path / "s.json"
    with pytest.raises(SystemExit):
        run_stage(path, lambda: {"a": killed}, 100, lambda: True)
    monkeypatch.undo()
    campaign._note(path, "killed after 100 s")
    assert read(path)["attempts"] == ({"a": 1} if counted else {}) and "running" not in read(path)


@pytest.mark.parametrize(
    "device, visible, expected",
    [("cuda:1", None, "1"), ("cuda:1", "4,6", "6"), ("cuda", "4,6", "4,6"), ("cpu", "4,6", "")],
)
def test_one_of_several_gpus_is_measured(monkeypatch, device, visible, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = campaign.surroundings(device)
    assert found["CUDA_VISIBLE_DEVICES"] == expected and "TRITON_INTERPRET" not in found
    assert found["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)


def test_a_slice_goes_on_from_todays_results_of_the_same_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(campaign, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(campaign, "WORK", tmp_path / "build")
    monkeypatch.setattr(campaign, "device_name", lambda device: "Some GPU 80GB")
    today = date.today()
    for root, days, commit in (
        ("results", 0, "now"),
        ("results", 1, "now"),
        ("results", 2, "now"),
        ("build/results", 0, "old"),
    ):
        name = merge.folder_name("Some GPU 80GB", (today - timedelta(days=days)).isoformat())
        merge.write(tmp_path / root / name / "models.json", record("2026", {}, commit=commit))
    monkeypatch.setattr(campaign, "commit", lambda: "now")
    found = campaign.resumed(campaign.parse(["--slice", "3"]))
    assert [path.parent.name for path in found] == ["results"] * 2
    assert [path.name[-8:] for path in found] == [f"{today - timedelta(days=1):%Y%m%d}", f"{today:%Y%m%d}"]
    assert campaign.resumed(campaign.parse(["--stages", "models"])) == []
    assert campaign.resumed(campaign.parse(["--slice", "3", "--resume", str(tmp_path)])) == [tmp_path]


def test_bad_options_end_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OUT", raising=False)
    assert campaign.main(["--device", "cuda:99", "--slice", "1", "--out", str(tmp_path)]) == 2
    assert "cuda:99" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        campaign.main(["--slice", "1", "--resume", str(tmp_path / "none")])
    assert "there is no such folder" in capsys.readouterr().err


def test_every_slice_ends_well_inside_ten_minutes_and_every_case_is_in_one():
    setting = Setting(torch.device("cuda"), torch.bfloat16, False, "synthetic", ROOT, 1.0)
    assert campaign.SECONDS + campaign.PACKING <= 540
    assert {part.stage for one in SLICES.values() for part in one.parts} == set(STAGES)
    for stage in ("models", "parts", "autotune", "memory", "step", "accuracy"):
        names = importlib.import_module(f"bench.stages.{stage}").cases(setting)
        parts = [part for one in SLICES.values() for part in one.parts if part.stage == stage]
        assert all(any(part.has(name) for part in parts) for name in names), stage


def test_first_networks_come_before_the_rest():
    setting = Setting(torch.device("cuda"), torch.bfloat16, False, "synthetic", ROOT, 1.0)
    (part,) = [part for part in SLICES[3].parts if part.stage == "models"]
    found = [name for name in models.cases(setting) if part.has(name)]
    five = [name for name in GPU if name != "preact_resnet1001"]
    assert found == [f"{name} | {group}" for group in ("fused", "compile") for name in five]


def test_no_case_has_many_variants_and_each_has_its_baseline():
    setting = Setting(torch.device("cuda"), torch.bfloat16, False, "synthetic", ROOT, 1.0)
    found = models.cases(setting)
    for name, case in found.items():
        variants = case.args[2]
        assert variants[0] == "eager" and 2 <= len(variants) <= 4, name
        assert sum(VARIANTS[variant].compile is not None for variant in variants) <= 1, name
    assert {variant for name, case in found.items() if "224" in name for variant in case.args[2]} == VARIANTS.keys()


def test_a_pytest_run_that_takes_too_long_reports_what_it_ran(tmp_path, monkeypatch):
    (tmp_path / "test_slow.py").write_text("import time\ndef test_quick(): pass\ndef test_slow(): time.sleep(300)\n")
    monkeypatch.setattr(stage_tests, "TO_END", 0)
    monkeypatch.setattr(stage_tests.importlib.util, "find_spec", lambda name: None)
    setting = Setting(torch.device("cpu"), torch.float32, True, "synthetic", tmp_path, stage_tests.TO_REPORT + 20)
    found = stage_tests.run(setting, [str(tmp_path / "test_slow.py")], 1)
    assert found["cut_off"] and found["passed"] == 1


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
    assert record["cases"]["a"]["error"] == "ValueError: no such layout" and "error" not in record["cases"]["b"]
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
    args = campaign.parse(["--out", str(tmp_path)])
    monkeypatch.setattr(campaign, "RESTARTS", 2)
    status, tail, killed = campaign._stream([sys.executable, "-c", "import time; time.sleep(60)"], dict(os.environ), 1)
    assert killed and status != 0
    monkeypatch.setattr(campaign, "_stream", lambda *_: (7, "out of luck", False))
    campaign._supervise(Part("models"), tmp_path / "models.json", args, 2, {})
    assert "given up after 2 processes" in read(tmp_path / "models.json")["stopped"]
    assert "ended with 7: out of luck" in read(tmp_path / "models.json")["stopped"]


def test_pytest_results_are_read(tmp_path):
    (tmp_path / "r.xml").write_text(
        '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1"><testcase classname="a" name="t1"/>'
        '<testcase classname="a" name="t2"><failure message="assert 1 == 2">trace</failure></testcase>'
        '<testcase classname="a" name="t3"><skipped/></testcase></testsuite></testsuites>'
    )
    found = read_junit(tmp_path / "r.xml")
    assert (found["passed"], found["failures"], found["skipped"]) == (1, 1, 1)
    (failed,) = found["failed"]
    assert (failed["test"], failed["message"]) == ("a::t2", "assert 1 == 2") and failed["traceback"] == "trace"


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


def test_a_traces_kernels_in_order():
    """As the profiler writes them, which is not by time."""
    facts = {"grid": [8, 1, 1], "block": [128, 1, 1], "registers per thread": 32, "shared memory": 0}
    events = [
        {"cat": "kernel", "name": "second", "ts": 10.5, "dur": 3.25, "args": facts},
        {"cat": "gpu_memcpy", "name": "copy", "ts": 7, "dur": 1, "args": {}},
        {"cat": "kernel", "name": "first" * 99, "ts": 2, "dur": 5.0, "args": facts},
    ]
    first, second = in_order(events)
    assert second == ["second", 3.25, [8, 1, 1], [128, 1, 1], 32, 0]
    assert first[0].startswith("firstfirst") and len(first[0]) == 120


def test_a_gpu_campaign_names_every_network_and_variant():
    setting = Setting(torch.device("cuda"), torch.bfloat16, False, "synthetic", ROOT, 1.0)
    assert setting.workloads().keys() == GPU.keys()
    assert {"compile graphs", "compile max-autotune", "vendor", "fused graph"} <= set(setting.variants("resnet50 224"))
    assert not [variant for variant in setting.variants("preact_resnet1001") if "compile" in variant]
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
