"""What each choice of a preset is worth: the preset, and again with one choice changed, over seeds.

    python -m bench.ablation --data cifar10 --epochs 2 --seeds 2

Runs lie under ``--work``; finished ones are not run again and a stopped one goes on, so the command can be repeated.
The result file has every run, and mean and standard error of each variant; the error of its difference to the preset
is by the standard deviation of a run over all variants, so ``--preset-seeds`` may be more than those of a lever.
"""

from __future__ import annotations

from typing import Any

from bench.record import write_results
from bench.sweeping import differences_of_means, make_parser, train_variants
from bench.tables import markdown
from fastres.train.sweep import Outcome, summarise

# Each changes one choice: the first ones take a lever away, those after "with" add one that the preset is without.
LEVERS: dict[str, dict[str, Any]] = {
    "preset": {},
    "no whitening": {"whiten": False},
    "SGD for Muon": {"optimizer": "sgd"},
    "constant rate": {"schedule": "constant", "warmup": 0.0},
    "cosine for triangle": {"schedule": "cosine"},
    "no label smoothing": {"label_smoothing": 0.0},
    "no weight decay": {"weight_decay": 0.0, "muon_decay": 0.0},
    "random flips": {"flip": "random"},
    "no flips": {"flip": "none"},
    "no translation": {"crop_pad": 0},
    "with cutout": {"cutout": 8},
    "no cutout": {"cutout": 0},
    "with EMA": {"ema": 0.98},
    "no EMA": {"ema": None},
    "with progressive resolution": {"progressive": "20:0.3,26:0.6"},
    "with fast biases": {"bias_lr": 8.0},
    "with batches of 512": {"batch_size": 512},
}


def variants_of(base: dict[str, Any], wanted: list[str] | None) -> dict[str, dict[str, Any]]:
    """The levers that change something in the options ``base``, or those of them that are ``wanted``."""
    changing = {
        name: changes
        for name, changes in LEVERS.items()
        if name == "preset" or any(base[option] != value for option, value in changes.items())
    }
    if wanted is None:
        return changing
    if unknown := sorted(set(wanted) - changing.keys()):
        raise SystemExit(f"no lever {unknown[0]!r}: choose from {', '.join(changing)}")
    return {name: changing[name] for name in ("preset", *wanted)}


def table(outcomes: list[Outcome]) -> str:
    """Accuracy of each variant, its difference to the preset in points, and the training seconds."""
    changes, lines = differences_of_means(outcomes, "val_accuracy"), []
    for entry in summarise(outcomes):
        if not entry["runs"]:
            lines.append([entry["variant"], "0", "failed", "", "", ""])
            continue
        change, error = changes.get(entry["variant"], (None, None))
        points = "" if change is None or entry["variant"] == "preset" else f"{100 * change:+.2f}"
        points += f" ± {100 * error:.2f}" if points and error is not None else ""
        tta = f"{entry['tta_accuracy']['mean']:.2%}" if "tta_accuracy" in entry else ""
        seconds = f"{entry['train_seconds']['mean']:.0f}"
        accuracy = f"{entry['val_accuracy']['mean']:.2%}"
        lines.append([entry["variant"], str(entry["runs"]), accuracy, points, tta, seconds])
    return markdown(["", "runs", "accuracy", "to the preset, points", "over several views", "training s"], lines)


def main(argv: list[str] | None = None) -> None:
    """Run what has not run yet, print the table, write the results."""
    parser = make_parser(__doc__.splitlines()[0], "ablation", data="auto", epochs=2, seeds=2)
    parser.add_argument("--levers", nargs="+", help="only these")
    parser.add_argument("--preset-seeds", type=int, default=0, help="of the preset itself [--seeds]")
    args = parser.parse_args(argv)
    outcomes, content = train_variants(args, lambda base: variants_of(base.to_dict(), args.levers))
    print("\n" + table(outcomes))
    write_results(args.out, content)


if __name__ == "__main__":
    main()
