"""Many runs of one recipe, over seeds and options, with their means: resumable, and a failed run stops no other."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

from fastres.atomic import atomic_write
from fastres.data import Dataset
from fastres.errors import FastresError
from fastres.train.config import TrainConfig
from fastres.train.facts import run_facts
from fastres.train.run_folder import RunFolder, saved_config
from fastres.train.trainer import Interrupted, Trainer

RESULT = "result.json"
MEASURES = ("val_accuracy", "tta_accuracy", "val_loss", "train_seconds", "seconds")
ELSEWHERE = {"data", "data_root", "device"}  # a sweep may go on where its data lies in another place
_OPTIONS = {f.name: f for f in fields(TrainConfig)}


def parse_setting(text: str) -> tuple[str, list[Any]]:
    """Option and values of ``"lr=0.1,0.2"``; values with commas in them are parted by semicolons.

    Raises:
        FastresError: for an unknown option, or a value of the wrong type.
    """
    name, equals, values = text.partition("=")
    name = name.strip().replace("-", "_")
    if not equals or not values or name not in _OPTIONS or name == "seed":
        raise FastresError(f"--set {text!r} must be an option of `fastres train` but seed, and values: lr=0.1,0.2")
    parts = values.split(";" if ";" in values else ",")
    return name, [_parse(text, name, part.strip()) for part in parts]


def _parse(text: str, name: str, value: str) -> Any:
    kind = _OPTIONS[name].metadata["kind"]
    if value.lower() == "none":
        return None
    try:
        return {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
    except (KeyError, ValueError):
        raise FastresError(f"--set {text!r}: {value!r} is not of type {kind.__name__}") from None


def grid(settings: Iterable[tuple[str, list[Any]]]) -> dict[str, dict[str, Any]]:
    """Every combination of the settings' values, by a name such as ``lr=0.1 ema=none``."""
    settings = list(settings)
    names = [name for name, _ in settings]
    combinations = [dict(zip(names, values)) for values in product(*(values for _, values in settings))]
    return {" ".join(f"{n}={v}" for n, v in changes.items()) or "base": changes for changes in combinations}


@dataclass(frozen=True)
class Outcome:
    """One run of a sweep: its last epoch's row, or one line that says why there is none."""

    variant: str
    seed: int
    row: dict[str, Any] | None
    failure: str | None = None


def sweep(
    base: TrainConfig,
    variants: Mapping[str, Mapping[str, Any]],
    seeds: Iterable[int],
    folder: Path,
    load: Callable[[TrainConfig], Dataset],
    say: Callable[[str], None] = print,
) -> list[Outcome]:
    """Train every variant with every seed under ``folder`` and keep `summary.md` and `summary.json` there up to date.

    A run that finished before is not run again, one that was stopped goes on, one that failed is tried again.

    Args:
        variants: changes of ``base`` by name.
        load: makes the data of a configuration.

    Raises:
        FastresError: before any run, for a variant that is no valid configuration, or for a folder that holds runs
            with other options.
        Interrupted: after a SIGINT or SIGTERM; the present run is saved.
    """
    runs = [
        (name, seed, base.replace(**changes, seed=seed), folder / _file_name(name) / f"seed-{seed}")
        for seed in seeds
        for name, changes in variants.items()
    ]
    for _, _, config, path in runs:
        _check_same(config, path)
    outcomes: list[Outcome] = []
    for number, (name, seed, config, path) in enumerate(runs, 1):
        try:
            known = (path / RESULT).exists()
            row = json.loads((path / RESULT).read_text()) if known else _run(config, path, load)
            outcomes.append(Outcome(name, seed, row))
            done = f"{row['val_accuracy']:.2%} in {row['seconds']:.0f} s{', run before' if known else ''}"
        except Interrupted as stop:
            raise Interrupted(stop.signum, f"{stop}, or with the whole sweep by the same command") from None
        except Exception as error:  # whatever one run does, the others count
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            outcomes.append(Outcome(name, seed, None, line))
            done = f"failed: {line}"
        say(f"{number}/{len(runs)} {name}, seed {seed}: {done}")
        write_summary(folder, outcomes)
    return outcomes


def _file_name(variant: str) -> str:
    return "".join(c if c.isalnum() or c in "=.-+" else "_" for c in variant)


def _check_same(config: TrainConfig, path: Path) -> None:
    if not (path / "config.json").exists():
        return
    saved, wanted = saved_config(path).to_dict(), config.to_dict()
    if differing := [name for name in wanted if name not in ELSEWHERE and saved[name] != wanted[name]]:
        name = differing[0]
        raise FastresError(f"{path} was run with {name} {saved[name]}, not {wanted[name]}: choose another --out")


def _run(config: TrainConfig, path: Path, load: Callable[[TrainConfig], Dataset]) -> dict[str, Any]:
    """Train, or go on with a run that was stopped; returns the last row."""
    folder = RunFolder(path, resume=True)
    try:
        trainer = Trainer(config, load(config), folder, say=lambda line: None)
        if folder.last.exists():
            trainer.resume()
        folder.write_config(config, run_facts(trainer))
        row = trainer.fit()[-1]
        with atomic_write(path / RESULT) as file:
            file.write(json.dumps(row).encode())
    finally:
        folder.close()
    return row


def summarise(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    """For each variant: number of runs, failures, and mean and standard error of each measure (None: of one run)."""
    by_variant: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_variant.setdefault(outcome.variant, []).append(outcome)
    summary = []
    for variant, group in by_variant.items():
        rows = [outcome.row for outcome in group if outcome.row is not None]
        means: dict[str, Any] = {}
        for name in MEASURES:
            values = [row[name] for row in rows if row[name] is not None]
            if values:
                means[name] = {"mean": statistics.mean(values), "standard_error": standard_error(values)}
        failures = {str(outcome.seed): outcome.failure for outcome in group if outcome.failure is not None}
        summary.append({"variant": variant, "runs": len(rows), "failures": failures, **means})
    return summary


def standard_error(values: list[float]) -> float | None:
    """Of the mean: sample standard deviation over the root of the count; None for fewer than two values."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def table(summary: list[dict[str, Any]]) -> str:
    """The summary as Markdown."""
    lines = [
        "| setting | runs | failed | accuracy | with mirror images | training s | with validation s |",
        "| :-- | --: | --: | --: | --: | --: | --: |",
    ]
    for entry in summary:
        shares = [_cell(entry.get(name), 100, 2, "%") for name in ("val_accuracy", "tta_accuracy")]
        times = [_cell(entry.get(name), 1, 1, "") for name in ("train_seconds", "seconds")]
        cells = [entry["variant"], str(entry["runs"]), str(len(entry["failures"])), *shares, *times]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: dict[str, Any] | None, scale: float, digits: int, unit: str) -> str:
    if value is None:
        return ""
    error = "" if value["standard_error"] is None else f" ± {scale * value['standard_error']:.{digits}f}"
    return f"{scale * value['mean']:.{digits}f}{error}{unit}"


def write_summary(folder: Path, outcomes: list[Outcome]) -> None:
    """Write ``summary.md`` and ``summary.json``.

    Raises:
        FastresError: when the disk takes no more.
    """
    summary = summarise(outcomes)
    runs = [asdict(outcome) for outcome in outcomes]
    failed = [f"- {o.variant}, seed {o.seed}: {o.failure}" for o in outcomes if o.failure is not None]
    text = table(summary) + "\n" + ("\nFailed:\n\n" + "\n".join(failed) + "\n" if failed else "")
    contents = {"summary.md": text, "summary.json": json.dumps({"summary": summary, "runs": runs}, indent=1) + "\n"}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            with atomic_write(folder / name) as file:
                file.write(content.encode())
    except OSError as error:
        raise FastresError(f"cannot write to {folder}: {error.strerror or error}; choose another --out") from error
