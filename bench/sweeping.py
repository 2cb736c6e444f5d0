"""What the scripts share that train variants of a preset over seeds: arguments, the runs, the result file's content."""

from __future__ import annotations

import argparse
import math
import os
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.record import RESULTS
from fastres.commands.options import DataCache
from fastres.train import TrainConfig, machine, preset
from fastres.train.sweep import Outcome, standard_error, summarise, sweep


def make_parser(description: str, name: str, data: str, epochs: int | None, seeds: int) -> argparse.ArgumentParser:
    """A parser of the common arguments with these defaults."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", default=data, help=f"as of `fastres train` [{data}]")
    parser.add_argument("--preset", default="speed")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--epochs", type=int, default=epochs, help="[the preset's]" if epochs is None else None)
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--limit-train", type=int)
    parser.add_argument("--limit-test", type=int)
    parser.add_argument("--batch-size", type=int, help="images a step [the preset's]")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", type=Path, default=Path("runs") / name, help="folder of the runs")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}-cpu.json", help="result file")
    return parser


def train_variants(
    args: argparse.Namespace, choose: Callable[[TrainConfig], Mapping[str, Mapping[str, Any]]]
) -> tuple[list[Outcome], dict[str, Any]]:
    """Train the variants that ``choose`` makes of the preset's configuration.

    Returns:
        The outcomes, and what the result file says of them.
    """
    torch.set_num_threads(args.threads)
    machine.treat_freed_memory(torch.device("cpu"), False)
    names = ("data", "epochs", "limit_train", "limit_test", "precision")
    changes = {name: getattr(args, name) for name in names if name != "epochs" or args.epochs is not None}
    base = preset(args.preset).replace(**changes)
    if args.batch_size:
        base = base.replace(batch_size=args.batch_size)
    load, variants, load_average = DataCache(), choose(base), os.getloadavg()[0]
    first = getattr(args, "first_seed", 0)
    run = partial(sweep, base, folder=args.work, load=load, say=lambda line: print(line, flush=True))
    outcomes = run(variants, range(first, first + args.seeds))
    if (more := getattr(args, "preset_seeds", 0)) > args.seeds:
        outcomes += run({"preset": variants["preset"]}, range(first + args.seeds, first + more))
    content = {
        "preset": args.preset,
        "data": load(base).label,
        "options": {**base.to_dict(), "data": None, "data_root": None},  # places on one machine
        "variants": variants,
        "load": load_average,
        "summary": summarise(outcomes),
        "runs": [asdict(outcome) for outcome in outcomes],
    }
    return outcomes, content


def differences(
    outcomes: list[Outcome], measure: str, reference: str = "preset"
) -> dict[str, tuple[float, float | None]]:
    """Mean difference of each variant to the reference and its standard error, over the seeds that both have."""
    rows = {(o.variant, o.seed): o.row[measure] for o in outcomes if o.row is not None}
    result = {}
    for variant in dict.fromkeys(o.variant for o in outcomes):
        pairs = [
            value - rows[reference, seed]
            for (v, seed), value in rows.items()
            if v == variant and (reference, seed) in rows
        ]
        if pairs:
            result[variant] = (statistics.mean(pairs), standard_error(pairs))
    return result


def differences_of_means(
    outcomes: list[Outcome], measure: str, reference: str = "preset"
) -> dict[str, tuple[float, float | None]]:
    """Difference of each variant's mean to the reference's, whatever seeds they have, and its standard error by the
    standard deviation of a run, pooled over all variants with several.
    """
    values: dict[str, list[float]] = {}
    for outcome in outcomes:
        if outcome.row is not None:
            values.setdefault(outcome.variant, []).append(outcome.row[measure])
    if reference not in values:
        return {}
    theirs, several = values[reference], [group for group in values.values() if len(group) > 1]
    squares = sum(statistics.variance(group) * (len(group) - 1) for group in several)
    freedom = sum(len(group) - 1 for group in several)

    def error(group: list[float]) -> float | None:
        return math.sqrt(squares / freedom * (1 / len(group) + 1 / len(theirs))) if freedom else None

    return {
        variant: (statistics.mean(group) - statistics.mean(theirs), error(group)) for variant, group in values.items()
    }
