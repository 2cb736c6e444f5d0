"""Time to accuracy, ablation and parity: their arithmetic, and a tiny run of each from end to end."""

import functools
import json

import pytest
import torch

from bench import ablation, accuracy, airbench, parity, plain
from bench.record import write_results
from bench.report import training
from fastres import ops
from fastres.data.dataset import make_dataset
from fastres.data.synthetic import CLASSES, LABEL, synthetic_split
from fastres.models import create_model
from fastres.train import preset
from fastres.train.sweep import Outcome

TINY = "--data synthetic --limit-train 48 --limit-test 20 --threads 1".split()


@pytest.fixture(autouse=True)
def aten():
    """Interpreted kernels would take minutes."""
    with ops.implementation("aten"):
        yield


def row(accuracy):
    return dict(val_accuracy=accuracy, tta_accuracy=accuracy, val_loss=1.0, train_seconds=4.0, seconds=5.0)


def test_ratios_and_lower_bounds():
    curves = {"fastres": [(0.5, 10.0), (0.9, 20.0)], "plain": [(0.9, 70.0)], "resnet18": [(0.4, 210.0)]}
    results = {n: [{"val_accuracy": a, "train_seconds": s} for a, s in rows] for n, rows in curves.items()}
    results["fastres"][-1]["tta_accuracy"] = 0.91
    assert accuracy.reached(results["fastres"], 0.9) == results["fastres"][1]
    assert accuracy.reached(results["resnet18"], 0.9) is None
    assert accuracy.ratios(results, 0.9) == [
        ["fastres", "20", "90.00%", "91.00%", "1.0x"],
        ["plain", "70", "90.00%", "", "3.5x"],
        ["resnet18", "more than 210", "40.00%", "", "more than 10.5x"],
    ]


def tiny_dataset():
    return make_dataset(synthetic_split(48, seed=0), synthetic_split(20, seed=1), CLASSES, LABEL)


def test_plain_loaders_yield_the_normalised_images():
    dataset = tiny_dataset()
    train, test = plain.loaders(dataset, 8, 2, "reflect", workers=0)
    images, labels = next(iter(test))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (dataset.mean, dataset.std))
    torch.testing.assert_close(images, (dataset.test.images - mean) / std, rtol=1e-4, atol=1e-4)
    assert torch.equal(labels, dataset.test.labels)
    assert len(train) == 6 and next(iter(train))[0].shape == (8, 3, 32, 32)


@pytest.mark.parametrize("target, limit, rows", [(0.0, 1e9, 1), (2.0, 1e9, 3), (2.0, 0.0, 1)])
def test_the_plain_loop_ends_at_the_target_the_epochs_or_the_limit(target, limit, rows):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10))
    optimizer, steps = torch.optim.SGD(model.parameters(), 1e-3), []
    loaders = plain.loaders(tiny_dataset(), 16, 2, "constant", workers=0)
    curve = plain.train(model, optimizer, steps.append, *loaders, 3, 0.0, target, limit)
    assert len(curve) == rows and steps == list(range(1 if limit == 0 else 3 * rows))
    assert curve[-1]["step"] == len(steps) and curve[-1]["train_seconds"] > 0
    if rows == 3:
        assert curve[2]["train_loss"] < curve[0]["train_loss"]


def test_contestants_run_once(tmp_path, monkeypatch):
    small = preset("speed").replace(batch_size=64)
    monkeypatch.setattr(accuracy, "preset", lambda name: small)
    monkeypatch.setattr(accuracy.data, "load", functools.cache(accuracy.data.load))
    monkeypatch.setattr(  # ResNet-18 would take half a minute
        accuracy, "create_model", lambda name, stem=None, **rest: create_model("resnet20" if stem else name, **rest)
    )
    monkeypatch.setattr(airbench, "BATCH", 64)
    tiny = dict.fromkeys(accuracy.AIRBENCH, airbench.Recipe((24, 24, 24), 1, 11.5))
    monkeypatch.setattr(accuracy, "AIRBENCH", tiny)
    monkeypatch.setattr(airbench, "rows", functools.partial(airbench.rows, compiled=False))
    out = tmp_path / "tta.json"
    argv = [*TINY, "--limit-train", "128", "--target", "0", "--epochs", "1", "--workers", "0", "--out", str(out)]
    for name in accuracy.CONTESTANTS:
        accuracy.main([*argv, "--contestants", name])
    first = json.loads(out.read_text())
    assert list(first["results"]) == accuracy.CONTESTANTS and first["settings"]["data"].startswith(LABEL)
    for name in accuracy.CONTESTANTS:
        accuracy.main([*argv, "--contestants", name])
    assert json.loads(out.read_text()) == first
    with pytest.raises(SystemExit, match="made with other settings"):
        accuracy.main([*argv, "--contestants", "plain", "--seed", "1"])
    out.unlink()
    with pytest.raises(SystemExit, match="did not reach 200.00%: lower --target"):
        accuracy.main([*argv, "--contestants", "fastres", "--target", "2"])


def test_every_lever_changes_the_preset():
    base = preset("speed")
    variants = ablation.variants_of(base.to_dict(), None)
    assert "preset" in variants and len(variants) >= 10
    for name, changes in variants.items():
        assert (base.replace(**changes) != base) == (name != "preset")
    assert list(ablation.variants_of(base.to_dict(), ["no flips"])) == ["preset", "no flips"]
    with pytest.raises(SystemExit, match="no lever 'no luck': choose from"):
        ablation.variants_of(base.to_dict(), ["no luck"])


def test_ablation_compares_means_by_the_deviation_of_all_runs():
    """Deviations 0.05 of two runs and 0.02 of three: pooled the root of (0.05^2 + 2 * 0.02^2) / 3."""
    outcomes = [Outcome("preset", s, row(0.8 + d)) for s, d in enumerate((-0.05 / 2**0.5, 0.05 / 2**0.5))]
    outcomes += [Outcome("no flips", s, row(0.7 + d)) for s, d in enumerate((-0.02, 0.0, 0.02))]
    outcomes += [Outcome("no luck", 0, None, "x"), Outcome("cutout", 0, row(0.81))]
    found = ablation.differences_of_means(outcomes, "val_accuracy")
    pooled = ((0.05**2 + 2 * 0.02**2) / 3) ** 0.5
    assert found["no flips"] == pytest.approx((-0.1, pooled * (1 / 2 + 1 / 3) ** 0.5))
    assert found["cutout"] == pytest.approx((0.01, pooled * 1.5**0.5)) and "no luck" not in found
    assert ablation.differences_of_means(outcomes[-1:], "val_accuracy") == {}
    lines = ablation.table(outcomes).splitlines()
    assert lines[3] == "| no flips | 3 | 70.00% | -10.00 ± 3.03 | 70.00% | 4 |"
    assert lines[4].startswith("| no luck | 0 | failed |")


def test_parity_is_over_pairs():
    outcomes = [Outcome("eager", s, row(a)) for s, a in enumerate((0.80, 0.84))]
    outcomes += [Outcome("fused", s, row(a)) for s, a in enumerate((0.81, 0.83))] + [Outcome("fused", 2, row(0.1))]
    between = parity.difference(outcomes)
    assert between["mean"] == pytest.approx(0) and between["standard_error"] == pytest.approx(0.01)
    assert between["eager_standard_deviation"] == pytest.approx(0.04 / 2**0.5)


@pytest.mark.parametrize("script, more", [(ablation, ["--levers", "no flips"]), (parity, ["--precision", "fp32"])])
def test_scripts_from_end_to_end(script, more, tmp_path, capsys):
    out = tmp_path / "result.json"
    argv = [*TINY, *more, "--epochs", "1", "--seeds", "2", "--batch-size", "16"]
    script.main([*argv, "--work", str(tmp_path / "runs"), "--out", str(out)])
    read = json.loads(out.read_text())
    assert read["data"].startswith(LABEL) and len(read["runs"]) == 4
    assert all(run["failure"] is None and run["row"]["epoch"] == 1 for run in read["runs"])
    assert [entry["runs"] for entry in read["summary"]] == [2, 2]
    shown = capsys.readouterr().out
    assert f"{read['summary'][0]['val_accuracy']['mean']:.2%}"[:4] in shown


def test_a_preset_of_steps_needs_epochs(tmp_path):
    arguments = [*TINY, "--target", "0.5", "--preset", "notebook", "--contestants", "fastres"]
    with pytest.raises(SystemExit, match="preset notebook is measured in steps: add --epochs"):
        accuracy.main([*arguments, "--out", str(tmp_path / "results.json")])


def test_the_report_has_what_airbenchs_recipes_reach_here(tmp_path):
    """Those that ran to their end."""
    row = {"val_accuracy": 0.75, "tta_accuracy": 0.765, "train_seconds": 1.0}
    for name, epochs in (("airbench", 10), ("airbench95", 14)):
        record = {"settings": {"data": "drawn"}, "results": {name: epochs * [row]}}
        write_results(tmp_path / f"time-to-accuracy-{name}-cpu.json", record)
    lines = training.equivalence_section(tmp_path).splitlines()
    assert len(lines) == 3 and lines[2].startswith("| 94.01% | 75.00% | 76.50% | 0.35 | drawn |")
    assert training.equivalence_section(tmp_path / "empty") is None


def test_the_report_has_every_target(tmp_path):
    """The highest first; a file whose preset has not run yet is left out."""
    rows = [{"val_accuracy": 0.9, "train_seconds": 20.0}]
    for name, target, results in (("", 0.8, {"fastres": rows}), ("-85", 0.85, {"fastres": rows}), ("-90", 0.9, {})):
        settings = {"target": target, "data": "drawn", "threads": 2, "workers": 2, "options": {"epochs": 14}}
        record = {"settings": settings, "load_5_minutes": {"fastres": 1.0}, "results": results}
        write_results(tmp_path / f"time-to-accuracy{name}-cpu.json", record)
    text = training.time_to_accuracy_section(tmp_path)
    assert (
        text.index("85.00% on drawn, 14 epochs of the preset") < text.index("80.00% on drawn")
        and "90.00% on" not in text
    )
    assert text.count("| fastres | 20 | 90.00% |  | 1.0x |") == 2
    assert "busy" not in text
    for contestant, load, warns in (("resnet18", 3.5, False), ("airbench", 3.5, True), ("plain", 4.5, True)):
        record["load_5_minutes"], record["results"] = {"fastres": 1.0, contestant: load}, {"fastres": rows}
        write_results(tmp_path / "time-to-accuracy-90-cpu.json", record)
        assert ("kept the machine busy" in training.time_to_accuracy_section(tmp_path)) == warns
    assert training.time_to_accuracy_section(tmp_path / "empty") is None
