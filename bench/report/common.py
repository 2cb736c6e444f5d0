"""What all sections of the report share: reading results, and saying where they were measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.record import ROOT

Record = dict[str, Any]


def read(path: Path) -> Record | None:
    """A result file; None: there is none."""
    return json.loads(path.read_text()) if path.exists() else None


def machine_line(record: Record) -> str:
    """Where and with what a record was measured."""
    where = record["device"]
    if where == "cpu":
        where = f"CPU ({record['cpu']}, {record['threads']} threads)"
    versions = record["versions"]
    return f"{where}, PyTorch {versions['torch']}, {record['date'][:10]}, commit {record['commit']}"


def busy(load: float | None, threads: int) -> str:
    """A warning where other processes took the cores that were measured on."""
    if load is None or load <= threads:
        return ""
    return (
        f" Other processes kept the machine busy (load average {load:.0f} for {threads} threads): rates "
        "are too low, and differences within the quartiles mean nothing."
    )


def number(value: float) -> str:
    """Four significant digits, without an exponent where they are before the point."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def picture(path: Path, text: str) -> str:
    """A Markdown picture for README.md; empty where there is none."""
    if not path.exists():
        return ""
    shown = path.resolve()
    return f"\n\n![{text}]({shown.relative_to(ROOT) if ROOT in shown.parents else shown})"


def measured_cases(record: Record) -> dict[str, Record]:
    """The cases that have figures."""
    return {name: case for name, case in record["cases"].items() if "error" not in case}


def networks(record: Record) -> dict[str, Record]:
    """The cases of stage `models` by network: those named ``<network> | <group of variants>`` as one.

    A variant's figures are of the first case that has them, with its ``speed`` in units of eager PyTorch in that very
    case.
    """
    found: dict[str, Record] = {}
    for name, case in measured_cases(record).items():
        one = found.setdefault(name.partition(" | ")[0], {**case, "variants": {}})
        base = case["variants"].get("eager", {}).get("seconds", {}).get("median")
        for variant, figures in case["variants"].items():
            if "seconds" in one["variants"].get(variant, {}):
                continue
            speed = {"speed": base / figures["seconds"]["median"]} if base and "seconds" in figures else {}
            one["variants"][variant] = {**figures, **speed}
    return found


def median(case: Record, variant: str) -> float | None:
    """Seconds of a step in a case of stage `models`; None: it was not measured, or failed."""
    return case["variants"].get(variant, {}).get("seconds", {}).get("median")


def ceilings(folder: Path) -> dict[str, float]:
    """GB/s of a copy and TFLOP/s of a matrix product by dtype, as measured; what there is of it."""
    record = read(folder / "environment.json")
    cases = measured_cases(record) if record else {}
    found = {name.removeprefix("matmul "): case["tflops"] for name, case in cases.items() if "tflops" in case}
    return found | ({"copy": cases["copy"]["gb_per_second"]} if "copy" in cases else {})
