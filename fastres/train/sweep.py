"""Many runs of one recipe, over seeds and options, with their means: resumable, and a failed run stops no other."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import count, product
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastres.atomic import atomic_write
from fastres.data import Dataset
from fastres.errors import FastresError
from fastres.train.config import TrainConfig
from fastres.train.facts import run_facts
from fastres.train.identity import CHOSEN_BY_MACHINE, check_same_weights, checksum, difference
from fastres.train.pretrained import settled
from fastres.train.run_folder import CONFIG, RESULT, RunFolder, read_config, saved_config
from fastres.train.trainer import Interrupted, Trainer

MEASURES = ("val_accuracy", "tta_accuracy", "val_loss", "train_seconds", "seconds")
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
    """Every combination of the settings' values, by a name such as ``lr=0.1 ema=none``.

    Raises:
        FastresError: for an option that is given twice, and for two combinations of one name.
    """
    settings = list(settings)
    names = [name for name, _ in settings]
    if twice := [name for name in names if names.count(name) > 1]:
        raise FastresError(f"--set {twice[0]} is given twice: write all its values in one, {twice[0]}=VALUE,VALUE")
    found: dict[str, dict[str, Any]] = {}
    for values in product(*(values for _, values in settings)):
        changes = dict(zip(names, values))
        name = " ".join(f"{option}={value}" for option, value in changes.items()) or "base"
        if found.setdefault(name, changes) != changes:
            raise FastresError(f"--set: two settings are called {name!r}: rename the values")
    return found


def new_folder(path: Path) -> Path:
    """``path``, or with a number behind it, made by this process: two sweeps that start at once have two.

    Raises:
        FastresError: when it cannot be made.
    """
    for number in count(1):
        numbered = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            numbered.mkdir(parents=True)
            return numbered
        except FileExistsError:
            continue
        except OSError as error:
            raise FastresError(f"cannot write to {path.parent}: {error.strerror}; choose another --out") from error
    raise AssertionError


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
        Interrupted: after a signal that asks it to end; the present run is saved.
    """
    runs = [
        (name, seed, settled(base.replace(**changes, seed=seed)), folder / _file_name(name) / f"seed-{seed}")
        for seed in seeds
        for name, changes in variants.items()
    ]
    for _, _, config, path in runs:
        check_same(config, path)
    outcomes: list[Outcome] = []
    for number, (name, seed, config, path) in enumerate(runs, 1):
        try:
            dataset = load(config)
            row = read_result(path, dataset)
            known = row is not None
            row = row or _run(config, path, dataset)
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
    """A name for a folder, another one for each variant."""
    # a space is a plus sign where there is none of its own
    spaced, safe = (variant, "=,") if "+" in variant else (variant.replace(" ", "+"), "=,+")
    name, text = quote(spaced, safe, errors="surrogateescape"), variant.encode("utf-8", "surrogateescape")
    return name if len(name) <= 120 else f"{name[:100]}-{hashlib.sha256(text).hexdigest()[:16]}"


def check_same(config: TrainConfig, path: Path) -> None:
    """Refuse a folder that holds a run with other options.

    Raises:
        FastresError: names the first of them, or the ``config.json`` that is damaged.
    """
    if not (path / CONFIG).exists():
        return
    if differs := difference(saved_config(path), config):
        raise FastresError(f"{path} was run with {differs}: choose another --out")
    check_same_weights(read_config(path), config, path)


def read_result(path: Path, dataset: Dataset) -> dict[str, Any] | None:
    """The last row of a finished run in a folder; None: there is none, or the file is not what was written.

    Raises:
        FastresError: where the run had other data.
    """
    try:
        content = json.loads((path / RESULT).read_text())
        row, digest = content["row"], content["digest"]
        if content["checksum"] != checksum([row, digest]):
            return None
    except (OSError, KeyError, TypeError, ValueError, RecursionError):
        return None
    if digest != dataset.digest:
        raise FastresError(f"{path} was run on other data than {dataset.label!r}: choose another --out")
    return row


def _run(config: TrainConfig, path: Path, dataset: Dataset) -> dict[str, Any]:
    """Train, or go on with a run that was stopped; returns the last row."""
    folder = RunFolder(path, resume=True)
    try:
        trainer = Trainer(_with_choices(config, path), dataset, folder, say=lambda line: None)
        if folder.begun():
            trainer.resume()
        folder.write_config(trainer.config, run_facts(trainer))
        row = trainer.fit()[-1]
        content = {"row": row, "digest": dataset.digest}
        with atomic_write(path / RESULT) as file:
            file.write(json.dumps({**content, "checksum": checksum(list(content.values()))}).encode())
    finally:
        folder.close()
    return row


def _with_choices(config: TrainConfig, path: Path) -> TrainConfig:
    """The configuration with the machine's choices that a run in the folder began with."""
    if not (path / CONFIG).exists():
        return config
    saved = saved_config(path)
    return config.replace(**{name: getattr(saved, name) for name in CHOSEN_BY_MACHINE})


def summarise(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    """For each variant: number of runs, failures, and of each measure mean, standard error of the mean and standard
    deviation of a run (None: of one run).
    """
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
                means[name] = {
                    "mean": statistics.mean(values),
                    "standard_error": standard_error(values),
                    "standard_deviation": statistics.stdev(values) if len(values) > 1 else None,
                }
        failures = {str(outcome.seed): outcome.failure for outcome in group if outcome.failure is not None}
        summary.append({"variant": variant, "runs": len(rows), "failures": failures, **means})
    return summary


def standard_error(values: list[float]) -> float | None:
    """Of the mean: sample standard deviation over the root of the count; None for fewer than two values."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def table(summary: list[dict[str, Any]]) -> str:
    """The summary as Markdown: means ± standard errors, and the standard deviation of a run's accuracy in points."""
    lines = [
        "| setting | runs | failed | accuracy | deviation | with views (--tta) | training s | with validation s |",
        "| :-- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for entry in summary:
        shares = [_cell(entry.get(name), 100, 2, "%") for name in ("val_accuracy", "tta_accuracy")]
        deviation = entry.get("val_accuracy", {}).get("standard_deviation")
        shares.insert(1, "" if deviation is None else f"{100 * deviation:.2f}")
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
                file.write(content.encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise FastresError(f"cannot write to {folder}: {error.strerror or error}; choose another --out") from error
