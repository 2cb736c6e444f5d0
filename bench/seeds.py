"""A preset over seeds: accuracy with its errors, arithmetic, minutes and curves.

    python -m bench.seeds --preset speed94 --data ~/cifar10 --seeds 5

Runs lie under ``--work``; finished ones are not run again and a stopped one goes on, so the command can be repeated,
with more seeds too. ``--first-seed`` runs others beside it, which a later call collects. Seconds are of training alone,
and like images/s medians: the first run compiles.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from bench.record import RESULTS, write_results
from bench.sweeping import make_parser, train_variants
from bench.tables import markdown
from fastres.train import PRESETS

# Accuracy and PFLOP that the README of cifar10-airbench (Jordan 2024) says, on the original pixels, over six views.
PUBLISHED = {"airbench94_muon": (0.9401, 0.29), "airbench95": (0.9501, 1.4), "airbench96_faster": (0.9600, 3.1)}
COLUMNS = ("", "seeds", "epochs", "accuracy", "of a run", "six views", "PFLOP", "images/s", "minutes")


def curves(work: Path, name: str = "preset") -> dict[str, dict[str, Any]]:
    """Of each seed's finished run under ``work``: its arithmetic and the epochs' rows."""
    found = {}
    for path in sorted((work / name).glob("seed-*/metrics.jsonl")):
        facts = json.loads((path.parent / "config.json").read_text())
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        kept = ("epoch", "train_loss", "val_loss", "val_accuracy", "tta_accuracy", "images_per_second", "train_seconds")
        found[path.parent.name.removeprefix("seed-")] = {
            "flops": facts["flops"],
            "device": facts["device"],
            "epochs": [{key: row[key] for key in kept} for row in rows],
        }
    return found


def label(content: dict[str, Any]) -> str:
    """The preset, and which of its options were others than they are today."""
    options = content["options"]
    today = {name: value for name, value in PRESETS[content["preset"]].items() if name in options}
    others = [f"{name.replace('_', '-')} {options[name]}" for name, value in today.items() if options[name] != value]
    return f"`{content['preset']}`" + (f" with {', '.join(others)}" if others else "")


def row(content: dict[str, Any]) -> list[str]:
    """A line of the table."""
    (entry,), runs = content["summary"], list(content["curves"].values())
    accuracy, seconds = entry["val_accuracy"], median_seconds(content)
    epochs = content["options"]["epochs"]
    cells = [label(content), str(entry["runs"]), str(epochs), _share(accuracy)]
    deviation = accuracy["standard_deviation"]
    cells.append("" if deviation is None else f"± {100 * deviation:.2f}")
    cells.append(_share(entry["tta_accuracy"]) if "tta_accuracy" in entry else "")
    rate = median(one["images_per_second"] for run in runs for one in run["epochs"])
    minutes = f"{seconds / 60:.0f}" if seconds > 600 else f"{seconds / 60:.2g}"
    return [*cells, f"{runs[0]['flops'] / 1e15:.3g}", f"{rate:.0f}", minutes]


def median_seconds(content: dict[str, Any]) -> float:
    """Of training, over the seeds."""
    return median(run["epochs"][-1]["train_seconds"] for run in content["curves"].values())


def _share(value: dict[str, Any]) -> str:
    error = value["standard_error"]
    return f"{value['mean']:.2%}" if error is None else f"{100 * value['mean']:.2f} ± {100 * error:.2f}%"


def table(contents: list[dict[str, Any]]) -> str:
    """A row a preset: mean and standard error of its accuracies, the standard deviation of one run's, the rest; below
    them what is published of others.
    """
    others = [
        [f"{name}, published", "", "", "", "", f"{accuracy:.2%}", f"{flops:.2g}", "", ""]
        for name, (accuracy, flops) in PUBLISHED.items()
    ]
    return markdown(COLUMNS, [*(row(content) for content in contents), *others])


def main(argv: list[str] | None = None) -> None:
    """Run what has not run yet, print the table, write the results."""
    parser = make_parser(__doc__.splitlines()[0], "seeds", data="auto", epochs=None, seeds=5)
    parser.set_defaults(preset="speed94", out=None)
    parser.add_argument("--first-seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.work = args.work / args.preset
    outcomes, content = train_variants(args, lambda base: {"preset": {}})
    if failed := [outcome for outcome in outcomes if outcome.failure is not None]:
        raise SystemExit(f"seed {failed[0].seed} failed: {failed[0].failure}")
    seeds = {str(outcome.seed) for outcome in outcomes}
    content["curves"] = {seed: run for seed, run in curves(args.work).items() if seed in seeds}
    print("\n" + table([content]))
    write_results(args.out or RESULTS / f"seeds-{args.preset}-cpu.json", content)


if __name__ == "__main__":
    main()
