"""A preset over seeds: tiny runs from end to end, what is collected, and the table."""

import json

import pytest

from bench import seeds
from bench.report import training
from fastres import ops

TINY = "--preset speed --data synthetic --limit-train 64 --limit-test 20 --batch-size 32 --epochs 1 --threads 1".split()


def test_seeds_are_collected_with_their_curves(tmp_path):
    argv = [*TINY, "--work", str(tmp_path / "work")]
    with ops.implementation("aten"):  # interpreted kernels would take minutes
        seeds.main([*argv, "--seeds", "1", "--first-seed", "1", "--out", str(tmp_path / "other.json")])
        assert list(json.loads((tmp_path / "other.json").read_text())["curves"]) == ["1"]
        seeds.main([*argv, "--seeds", "2", "--out", str(tmp_path / "seeds-speed-cpu.json")])
    found = json.loads((tmp_path / "seeds-speed-cpu.json").read_text())
    assert list(found["curves"]) == ["0", "1"] and found["options"]["epochs"] == 1
    (entry,) = found["summary"]
    assert entry["runs"] == 2 and entry["val_accuracy"]["standard_deviation"] is not None
    for run in found["curves"].values():
        assert len(run["epochs"]) == 1 and run["flops"] > 64 * 128e6
    text = training.seeds_section(tmp_path)
    assert "| `speed` with epochs 1, batch-size 32 | 2 | 1 |" in text and "airbench94_muon, published" in text


def test_the_table_has_errors_where_there_are_several_seeds():
    value = {"mean": 0.9, "standard_error": 0.001, "standard_deviation": 0.002}
    one = {"mean": 0.9, "standard_error": None, "standard_deviation": None}

    def run(seconds: float) -> dict:
        rates = (100.0, 200.0)
        return {"flops": 2.5e14, "epochs": [{"images_per_second": rate, "train_seconds": seconds} for rate in rates]}

    runs = {"0": run(900.0), "1": run(90.0), "2": run(90.0)}  # the first one compiles
    content = {"preset": "speed94", "options": {"epochs": 9}, "curves": runs}
    entry = {"runs": 2, "val_accuracy": value, "tta_accuracy": value}
    cells = ["`speed94` with epochs 9", "2", "9", "90.00 ± 0.10%", "± 0.20", "90.00 ± 0.10%", "0.25", "150", "1.5"]
    assert seeds.row({**content, "summary": [entry]}) == cells
    alone = {"runs": 1, "val_accuracy": one}
    assert seeds.row({**content, "summary": [alone]})[3:6] == ["90.00%", "", ""]
    assert "airbench94_muon, published | " in seeds.table([{**content, "summary": [alone]}])


def test_a_failed_seed_ends_it(tmp_path):
    with pytest.raises(SystemExit, match="seed 0 failed: batch size"):
        seeds.main(
            [*TINY, "--batch-size", "128", "--seeds", "1", "--work", str(tmp_path), "--out", str(tmp_path / "x")]
        )
