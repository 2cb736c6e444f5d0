"""Sections of training on a CPU: rates, the loop's own share, accuracies, time to accuracy, ablation and parity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench import ablation, accuracy, airbench, loop, parity, seeds
from bench.report.common import busy, machine_line, read
from bench.tables import markdown
from fastres.train.sweep import Outcome


def rates_section(path: Path) -> str | None:
    """Images a second of the presets, by precision."""
    record = read(path)
    if not record:
        return None
    found: dict[str, dict[str, float]] = {}
    for one in record["rates"]:
        found.setdefault(one["preset"], {})[one["precision"]] = one["images_per_second"]
    precisions = list(dict.fromkeys(precision for line in found.values() for precision in line))
    rows = [
        [f"`{preset}`", *(f"{line[p]:.0f}" if p in line else "" for p in precisions)] for preset, line in found.items()
    ]
    table = markdown(["preset, images/s", *precisions], rows)
    return f"Measured on {machine_line(record)}.{busy(record['load'], record['threads'])}\n\n{table}"


def runs_section(path: Path) -> str | None:
    """Last accuracy of every collected run."""
    record = read(path)
    if not record:
        return None
    rows = []
    for run in record["runs"]:
        last = run["epochs"][-1]
        mirrored = last.get("tta_accuracy")
        rows.append(
            [
                f"`{run['name']}`",
                run["data"],
                run["dtype"],
                f"{last['epoch']} ({last['step']})",
                f"{last['val_accuracy']:.2%}",
                "" if mirrored is None else f"{mirrored:.2%}",
                run["device"].removeprefix("cpu (").rpartition(", ")[2].rstrip(")"),
                f"{last['seconds'] / 60:.1f}",
            ]
        )
    columns = (
        "run",
        "data",
        "dtype",
        "epochs (steps)",
        "accuracy",
        "with mirror images",
        "on",
        "minutes, with validation",
    )
    versions = sorted({run["versions"]["torch"] for run in record["runs"]})
    where = f"One run each on {record['cpu']}, PyTorch {', '.join(versions)}, collected {record['date'][:10]}"
    return f"{where}, commit {record['commit']}.\n\n{markdown(columns, rows)}"


def seeds_section(results: Path) -> str | None:
    """Presets over seeds, those of one set of data and one kind of device in a table."""
    records = [read(path) for path in sorted(results.glob("seeds-*.json"))]
    tables = []
    kinds = dict.fromkeys((record["data"], record["device"]) for record in records if record)
    for data, device in kinds:
        of_data = [record for record in records if record and (record["data"], record["device"]) == (data, device)]
        where = "; ".join(dict.fromkeys(f"{machine_line(record)}" for record in of_data))
        warning = busy(max(record["load"] for record in of_data), of_data[0]["threads"])
        tables.append(f"{data}, measured on {where}.{warning}\n\n{seeds.table(of_data)}")
    return "\n\n".join(tables) or None


def loop_section(path: Path) -> str | None:
    """What an epoch's time goes to."""
    record = read(path)
    if not record:
        return None
    where = f"Shares of an epoch's time, measured on {machine_line(record)}.{busy(record['load'], record['threads'])}"
    return f"{where}\n\n{loop.table(record['loop'])}"


def time_to_accuracy_section(results: Path) -> str | None:
    """Seconds of training to an accuracy, for each that was measured, the highest first."""
    records = [read(path) for path in results.glob("time-to-accuracy*-cpu.json")]
    measured = [record for record in records if record and "fastres" in record["results"]]
    measured.sort(key=lambda record: -record["settings"]["target"])
    return "\n\n".join(map(_to_one_accuracy, measured)) or None


def _to_one_accuracy(record: dict[str, Any]) -> str:
    settings = record["settings"]
    loads = record["load_5_minutes"]
    workers = dict.fromkeys(accuracy.IN_PLAIN_LOOP, settings["workers"])
    excess, name = max((load - settings["threads"] - workers.get(name, 0), name) for name, load in loads.items())
    warning = busy(loads[name], settings["threads"] + workers.get(name, 0)) if excess > 0 else ""
    return (
        f"{settings['target']:.2%} on {settings['data']}, {settings['options']['epochs']} epochs of the preset, "
        f"measured on {machine_line(record)}.{warning}\n\n{accuracy.table(record['results'], settings['target'])}"
    )


def equivalence_section(results: Path) -> str | None:
    """What networks and recipes of airbench's class, whose accuracy on the original pixels is published, reach on other
    data: the last epoch of each that ran to its end.
    """
    lines = []
    for name, recipe in accuracy.AIRBENCH.items():
        for path in sorted(results.glob("time-to-accuracy*-cpu.json")):
            record = read(path) or {"results": {}}
            rows = record["results"].get(name, [])
            if len(rows) < recipe.epochs:
                continue
            reached = [f"{rows[-1][kind]:.2%}" for kind in ("val_accuracy", "tta_accuracy")]
            pflop = f"{airbench.operations(recipe) / 1e15:.2f}"
            lines.append([f"{recipe.accuracy:.2%}", *reached, pflop, record["settings"]["data"], machine_line(record)])
    columns = ["published, six views", "here", "six views", "PFLOP", "data", "machine"]
    return markdown(columns, lines) if lines else None


def ablation_section(results: Path) -> str | None:
    """What each choice of a preset is worth, a table a preset."""
    records = [read(path) for path in sorted(results.glob("ablation*-cpu.json"), reverse=True)]
    return "\n\n".join(_ablation(record) for record in records if record) or None


def _ablation(record: dict[str, Any]) -> str:
    where = f"`{record['preset']}` on {record['data']}, {record['options']['epochs']} epochs, measured on "
    where += f"{machine_line(record)}.{busy(record['load'], record['threads'])}"
    return f"{where}\n\n{ablation.table([Outcome(**run) for run in record['runs']])}"


def parity_section(path: Path) -> str | None:
    """Accuracies of both backends."""
    record = read(path)
    if not record:
        return None
    between = record["fused_minus_eager"]
    pairs = [
        f"{name} {100 * between[key]:{sign}.2f}"
        for name, key, sign in (
            ("fused less eager with the same seed, points: mean", "mean", "+"),
            ("standard error", "standard_error", ""),
            ("standard deviation over seeds", "eager_standard_deviation", ""),
        )
        if between[key] is not None
    ]
    where = f"{record['data']}, {record['options']['epochs']} epochs, measured on {machine_line(record)}."
    table = parity.table(record["summary"])
    return f"{where}{busy(record['load'], record['threads'])}\n\n{table}\n\n{', '.join(pairs).capitalize()}."
