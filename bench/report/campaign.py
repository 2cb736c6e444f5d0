"""Sections of a campaign's folder (see `bench.campaign`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bench.report.common import (
    Record,
    busy,
    ceilings,
    machine_line,
    measured_cases,
    median,
    networks,
    number,
    picture,
    read,
)
from bench.tables import markdown


def environment_section(folder: Path) -> str | None:
    """Measured ceilings."""
    record = read(folder / "environment.json")
    found = ceilings(folder)
    if not record or not found:
        return None
    rows = [["large copy, bytes read and written", f"{found['copy']:.4g} GB/s"]] if "copy" in found else []
    rows += [[f"large matrix product, {name}", f"{rate:.3g} TFLOP/s"] for name, rate in found.items() if name != "copy"]
    load = measured_cases(record).get("machine", {}).get("load_average")
    where = f"Measured ceilings: {machine_line(record)}.{busy(load, record['threads'])}"
    return f"{where}\n\n{markdown(('ceiling', 'measured'), rows)}"


def models_section(folder: Path, counted: dict[str, dict[str, float]] | None = None) -> str | None:
    """A table a network: variants, their times and rates.

    Args:
        counted: bytes an image of whole steps by network and variant, see `bench.report.counted.bytes_an_image`.
    """
    record = read(folder / "models.json")
    if not record:
        return None
    limits, tables = ceilings(folder), []
    for case in networks(record).values():
        key = f"{case['model']} {case['image_size']}"
        known = (counted or {}).get(key, {}) if record["device"] != "cpu" else {}  # a CPU runs other kernels
        title = f"{case['model']}, batch {case['batch']}, {case['image_size']}x{case['image_size']}, {case['dtype']}"
        note = " GB/s: bytes counted for the step (a static count) over the measured time." if known else ""
        table = _variants(case, limits.get(case["dtype"]), known)
        tables.append(f"**{title}**, one training step.{note}\n\n{table}")
    if not tables:
        return None
    return f"{_measured_on(folder, record)}\n\n" + "\n\n".join(tables)


def _variants(case: Record, limit: float | None, bytes_an_image: dict[str, float]) -> str:
    """A row a variant; a column of GB/s where the bytes are known.

    Args:
        limit: TFLOP/s of a large matrix product.
    """
    columns = ["variant", "ms a step", "quartiles", "images/s", "TFLOP/s", "of the measured ceiling"]
    columns += ["GB/s"] * bool(bytes_an_image) + ["speed"]
    rows = []
    for variant, figures in case["variants"].items():
        if "error" in figures:
            error = figures["error"][:60].replace("|", "/").replace("\n", " ")
            rows.append([variant, error, *[""] * (len(columns) - 2)])
            continue
        seconds = figures["seconds"]
        median, low, high = (seconds[name] for name in ("median", "low", "high"))
        row = [variant, number(1e3 * median), f"{number(1e3 * low)} to {number(1e3 * high)}"]
        row += [number(figures["images_per_second"]), f"{figures['tflops']:.3g}"]
        row.append(f"{figures['tflops'] / limit:.0%}" if limit else "")
        if bytes_an_image:
            moved = bytes_an_image.get(variant, 0) * case["batch"]
            row.append(f"{moved / median / 1e9:.4g}" if moved else "")
        rows.append([*row, f"{figures['speed']:.2f}x" if "speed" in figures else ""])
    return markdown(columns, rows)


def _measured_on(folder: Path, record: Record) -> str:
    """The machine, with a warning where it was busy as the campaign began."""
    environment = read(folder / "environment.json")
    load = measured_cases(environment).get("machine", {}).get("load_average") if environment else None
    return f"Measured on {machine_line(record)}.{busy(load, record['threads'])}"


def speeds_section(folder: Path) -> str | None:
    """Every network in a row: images/s of eager channels-last, and each variant's speed in units of it; pictures."""
    record = read(folder / "models.json")
    if not record:
        return None
    single = {name: case for name, case in networks(record).items() if ", batch " not in name}
    variants = list(
        dict.fromkeys(variant for case in single.values() for variant in case["variants"] if variant != "eager")
    )
    rows = []
    for case in single.values():
        if not (base := median(case, "eager")):
            continue
        speeds = [case["variants"].get(variant, {}).get("speed") for variant in variants]
        cells = ["" if speed is None else f"{speed:.2f}x" for speed in speeds]
        name = f"{case['model']}, batch {case['batch']}, {case['image_size']} pixels, {case['dtype']}"
        rows.append([name, number(case["batch"] / base), *cells])
    if not rows:
        return None
    pictures = picture(folder / "models.png", "Speeds of the variants")
    pictures += picture(folder / "batches.png", "images/s by batch")
    table = markdown(["network", "images/s, eager", *variants], rows)
    return f"{_measured_on(folder, record)}\n\n{table}{pictures}"


def memory_section(folder: Path) -> str | None:
    """Peak memory by network and variant."""
    record = read(folder / "memory.json")
    if not record or not measured_cases(record):
        return None
    networks: dict[str, dict[str, Record]] = {}
    for case in measured_cases(record).values():
        networks.setdefault(f"{case['workload']}, batch {case['batch']}", {})[case["variant"]] = case
    variants = list(dict.fromkeys(variant for found in networks.values() for variant in found))
    rows = []
    for name, found in networks.items():
        rows.append(
            [
                name,
                *(f"{found[p]['peak_mib'] - found[p]['idle_mib']:.0f}" if p in found else "" for p in variants),
            ]
        )
    return (
        f"Memory that a training step adds, MiB, measured on {machine_line(record)}.\n\n"
        f"{markdown(['network', *variants], rows)}"
    )


def parts_section(folder: Path) -> str | None:
    """Stages and blocks by variant, then operations by implementation."""
    record = read(folder / "parts.json")
    if not record:
        return None
    cases = measured_cases(record)
    blocks = [case for case in cases.values() if "variants" in case]
    text: list[str] = []
    if blocks:
        variants = list(dict.fromkeys(variant for case in blocks for variant in case["variants"]))
        rows = [
            [
                f"{case['network']} {case['part']}, {case['blocks']} blocks, batch {case['batch']}",
                *(_ms(case["variants"].get(p)) for p in variants),
            ]
            for case in blocks
        ]
        text.append(f"Forward and backward of a stage or its first block, ms.\n\n{markdown(['part', *variants], rows)}")
    calls = {name: case for name, case in cases.items() if "calls" in case}
    for name, case in calls.items():
        which = list(dict.fromkeys(c for call in case["calls"].values() for c in call["candidates"]))
        rows = [
            [op, f"{call['bytes'] / 1e6:.3g}", *(_rate(call["candidates"].get(c)) for c in which)]
            for op, call in case["calls"].items()
        ]
        columns = ["operation", "MB, each tensor once", *(f"{c}: ms, GB/s" for c in which)]
        text.append(f"{name}, batch {case['batch']}.\n\n{markdown(columns, rows)}")
    if not text:
        return None
    roof = picture(folder / "roofline.png", "Operations under the measured roof")
    return f"Measured on {machine_line(record)}.\n\n" + "\n\n".join(text) + roof


def _ms(figures: Record | None) -> str:
    if figures is None:
        return ""
    return f"{1e3 * figures['seconds']['median']:.4g}" if "seconds" in figures else "failed"


def _rate(figures: Record | None) -> str:
    if figures is None or "seconds" not in figures:
        return _ms(figures)
    return f"{_ms(figures)}, {figures['gb_per_second']:.3g}" if "gb_per_second" in figures else _ms(figures)


def step_section(folder: Path) -> str | None:
    """Launches, the sum of the kernels' times beside the step's, and the first kernels."""
    record = read(folder / "step.json")
    if not record or not measured_cases(record):
        return None
    cases = measured_cases(record).values()
    what = "operations" if record["device"] == "cpu" else "kernels"
    rows = [
        [
            f"{case['workload']}, batch {case['batch']}",
            case["variant"],
            str(case["kernels"]["launches"]),
            f"{1e3 * case['step']['median']:.4g}",
            f"{1e3 * case['kernels']['seconds']:.4g}",
            f"{1e3 * case['host_seconds']:.4g}",
            ", ".join(
                f"{top['name'][:40].replace('|', '/')} {1e3 * top['seconds']:.3g}" for top in case["kernels"]["top"][:3]
            ),
        ]
        for case in cases
    ]
    columns = (
        "network",
        "variant",
        f"{what} a step",
        "ms a step",
        f"ms of all {what}",
        "ms of the host",
        "first three, ms",
    )
    return f"Profiler's trace of a step on {machine_line(record)}.\n\n{markdown(columns, rows)}"


def tests_section(folder: Path) -> str | None:
    """Counts of the test suite."""
    record = read(folder / "tests.json")
    if not record or not measured_cases(record):
        return None
    cases = measured_cases(record)
    rows = [
        [name, str(case["passed"]), str(case["failures"] + case["errors"]), str(case["skipped"])]
        for name, case in cases.items()
    ]
    return f"Tests on {machine_line(record)}.\n\n{markdown(('tests', 'passed', 'failed', 'skipped'), rows)}"


def accuracy_section(folder: Path) -> str | None:
    """Accuracy and seconds at the end of each run of the preset ``speed``."""
    record = read(folder / "accuracy.json")
    if not record or not measured_cases(record):
        return None
    rows = []
    for case in measured_cases(record).values():
        last, best = case["epochs"][-1], max(case["epochs"], key=lambda row: row["val_accuracy"])
        rows.append(
            [
                case["backend"],
                str(case["seed"]),
                case["data"],
                str(last["epoch"]),
                f"{best['val_accuracy']:.2%}",
            ]
            + [f"{last['seconds']:.1f}", f"{last['images_per_second']:.0f}"]
        )
    columns = ("backend", "seed", "data", "epochs", "best accuracy", "seconds", "images/s")
    return f"`fastres train --preset speed` on {machine_line(record)}.\n\n{markdown(columns, rows)}"


CAMPAIGN: dict[str, Callable[[Path], str | None]] = {
    "environment": environment_section,
    "tests": tests_section,
    "models": models_section,
    "memory": memory_section,
    "parts": parts_section,
    "step": step_section,
    "accuracy": accuracy_section,
}
