"""Sections of single results: growth, a CPU against every baseline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import cpu, growth, levers
from bench.report.common import busy, machine_line, picture, read
from bench.tables import markdown


def growth_section(path: Path) -> str | None:
    """Growth with batch, depth and resolution."""
    record = read(path)
    if not record:
        return None
    return (
        f"One training step, {record['dtype']}, measured on {machine_line(record)}."
        f"{busy(record['load_average'], record['threads'])}\n\n"
        f"{markdown(growth.COLUMNS, growth.rows(record['points']))}"
        + picture(path.with_suffix(".png"), "images/s and memory against batch, depth and resolution")
    )


def cpu_section(results: Path, table: Callable[[list[dict[str, Any]]], str] = cpu.table) -> str | None:
    """Training and inference against every baseline, on each kind of CPU that was measured."""
    parts = []
    for path in sorted(results.glob("cpu-*.json")):
        if record := read(path):
            kind = record.get("instructions") or path.stem.removeprefix("cpu-").upper()
            parts.append(
                f"With {kind}: measured on {machine_line(record)}.{busy(record['load_average'], record['threads'])}"
                f"\n\n{table(record['workloads'])}"
            )
    return "\n\n".join(parts) or None


def cpu_ablation_section(path: Path) -> str | None:
    """What each lever of the CPU's implementation is worth."""
    record = read(path)
    if not record:
        return None
    return (
        f"{record['settings']['precision']}, measured on {machine_line(record)}."
        f"{busy(record['load_average'], record['threads'])}\n\n{levers.table(record['workloads'])}"
    )


def faults_section(path: Path) -> str | None:
    """How often each fault was tried on a run, and how it ended."""
    record = read(path)
    if not record:
        return None
    columns = ("fault", "tried", "refused", "harmless", "wrong")
    rows = [[str(row[column]) for column in columns] for row in record["faults"]]
    return (
        f"Tried on {machine_line(record)}. Refused: one line that names the file or the remedy; harmless: the same "
        f"data or, resumed, the same run.\n\n{markdown(columns, rows)}"
    )
