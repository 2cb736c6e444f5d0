"""Fused and eager backends reach the same accuracy: both over several seeds, with means and standard errors.

    python -m bench.parity --data cifar10 --limit-train 10000 --epochs 3 --seeds 5

Runs lie under ``--work`` as those of `bench.ablation`. Both backends have the same initial weights, order and
augmentation for a seed, so the difference is also given over pairs, and beside it what two eager runs differ by with
other seeds.
"""

from __future__ import annotations

import statistics
from typing import Any

from bench.record import write_results
from bench.sweeping import differences, make_parser, train_variants
from bench.tables import markdown
from fastres.train.sweep import Outcome

BACKENDS = {"eager": {"backend": "eager"}, "fused": {"backend": "fused"}}


def difference(outcomes: list[Outcome]) -> dict[str, float | None]:
    """Fused less eager: mean over the seeds that both have, standard error over pairs, and standard deviation of the
    eager runs' accuracy."""
    mean, error = differences(outcomes, "val_accuracy", "eager").get("fused", (None, None))
    eager = [o.row["val_accuracy"] for o in outcomes if o.variant == "eager" and o.row is not None]
    return {
        "mean": mean,
        "standard_error": error,
        "eager_standard_deviation": statistics.stdev(eager) if len(eager) > 1 else None,
    }


def table(summary: list[dict[str, Any]]) -> str:
    """Mean accuracies with their standard errors, and training seconds, of each backend."""
    lines = []
    for entry in (e for e in summary if e["runs"]):
        cells = [entry[name] for name in ("val_accuracy", "tta_accuracy")]
        errors = ["" if c["standard_error"] is None else f" ± {100 * c['standard_error']:.2f}" for c in cells]
        shown = [f"{100 * c['mean']:.2f}{error}%" for c, error in zip(cells, errors)]
        lines.append([entry["variant"], str(entry["runs"]), *shown, f"{entry['train_seconds']['mean']:.0f}"])
    return markdown(["backend", "seeds", "accuracy", "with mirror images", "training s"], lines)


def main(argv: list[str] | None = None) -> None:
    """Run what has not run yet, print the table, write the results."""
    args = make_parser(__doc__.splitlines()[0], "parity", data="synthetic", epochs=3, seeds=5).parse_args(argv)
    outcomes, content = train_variants(args, lambda base: BACKENDS)
    between = difference(outcomes)
    print("\n" + table(content["summary"]))
    print("\nfused - eager, points:", {k: v if v is None else round(100 * v, 3) for k, v in between.items()})
    write_results(args.out, {**content, "fused_minus_eager": between})


if __name__ == "__main__":
    main()
