"""Sections that nothing was run for on the device: predictions, counts of bytes, compiled machine code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from bench import roofline
from bench.report.common import Record, read
from bench.tables import markdown

KINDS = tuple(roofline.KINDS)  # eager, compiled, fused


def roofline_section(path: Path) -> str | None:
    """The roofline's table: what bytes and operations alone would take."""
    record = read(path)
    if not record:
        return None
    assumed = "; ".join(
        f"{name} {one['bandwidth'] / 1e12:.2f} TB/s and {one['rate'] / 1e12:.0f} TFLOP/s"
        for name, one in record["machines"].items()
    )
    name, machine = next(iter(record["machines"].items()))
    bandwidth, rate = roofline.DATA_SHEETS[name]
    shares = f"{machine['bandwidth'] / bandwidth:.0%} and {machine['rate'] / rate:.0%} of the data sheets', assumed"
    return (
        "**Lower bounds, not measurements**: no GPU was used, and no kernel reaches its roof. Batch "
        f"{record['batch']}, {record['dtype']}; counted bytes and operations of every launch under a roof of {assumed} "
        f"({shares}), {1e6 * machine['launch']:.0f} us a launch.\n\n"
        f"{markdown(roofline.COLUMNS, roofline.rows(record['predictions']))}"
    )


def traffic_section(results: Path) -> str | None:
    """Counted bytes of a step by stage, and of whole networks."""
    text = []
    for network, record, counted in _networks(results):
        wholes = [whole for _, whole in counted["stages"]]
        rows = [
            [whole["part"], str(whole["blocks"]), "x".join(map(str, whole["input"])), *_bytes(whole)]
            for whole in wholes
        ]
        rows.append(["all", str(sum(whole["blocks"] for whole in wholes)), "", *_bytes(_total(wholes))])
        title = f"{network}, {record['batch']} images of {counted['image']}x{counted['image']}, {record['dtype']}"
        where = f"**{title}**, static count, commit {record['commit']}."
        columns = ("first block", "blocks", "input CxHxW", *TRAFFIC_COLUMNS)
        text.append(f"{where}\n\n{markdown(columns, rows)}")
    return "\n\n".join(text) or None


def network_traffic_section(results: Path) -> str | None:
    """Counted bytes of a step, a row a network."""
    rows = []
    for network, record, counted in _networks(results):
        total = _total([whole for _, whole in counted["stages"]])
        rows.append([f"{network}, {record['batch']} images of {counted['image']} pixels", *_bytes(total)])
    return markdown(("network", *TRAFFIC_COLUMNS), rows) if rows else None


def _networks(results: Path) -> Iterator[tuple[str, Record, Record]]:
    """Name, file and count of each network that was counted."""
    for file in sorted(results.glob("traffic*.json")):
        record = json.loads(file.read_text())
        for network, counted in record["networks"].items():
            yield network, record, counted


def _total(wholes: list[Record]) -> Record:
    """The sum of the stages' counts."""
    return {
        kind: {name: sum(whole[kind][name] for whole in wholes) for name in wholes[0][kind]}
        for kind in ("moved", "saved")
    }


TRAFFIC_COLUMNS = ("eager MB", "compiled MB", "fused MB", "fused / eager", "fused / compiled", "kept: fused / eager",
                   "memory mode / eager")  # fmt: skip


def _bytes(counted: Record) -> list[str]:
    moved, saved = counted["moved"], counted["saved"]
    return [
        *(f"{moved[kind] / 1e6:.0f}" for kind in KINDS),
        f"{moved['fused'] / moved['eager']:.2f}",
        f"{moved['fused'] / moved['compiled']:.2f}",
        *(f"{saved[mode] / saved['eager']:.2f}" if saved["eager"] else "" for mode in ("fused", "recompute")),
    ]


def bytes_an_image(results: Path) -> dict[str, dict[str, float]]:
    """Counted bytes of a step, of one image, by ``"model size"`` and variant, from `bench.traffic`'s results."""
    return {
        f"{counted['model']} {counted['image']}": {
            variant: sum(whole["moved"][kind] for _, whole in counted["stages"]) / record["batch"]
            for kind, variant in roofline.KINDS.items()
        }
        for _, record, counted in _networks(results)
    }


def machine_code_section(results: Path) -> str | None:
    """What the compiled kernels need, by kernel and architecture; read from machine code, nothing ran."""
    groups: dict[tuple[str, int], list[Record]] = {}
    for row in _compiled(results):
        groups.setdefault((row["kernel"].removesuffix("_kernel"), row["arch"]), []).append(row)
    rows = [[kernel, f"sm_{arch}", *_resources(found)] for (kernel, arch), found in sorted(groups.items())]
    return markdown(("kernel", "architecture", *AOT_COLUMNS), rows) if rows else None


def architectures_section(results: Path) -> str | None:
    """`machine_code_section`, all kernels of an architecture in a row."""
    groups: dict[int, list[Record]] = {}
    for row in _compiled(results):
        groups.setdefault(row["arch"], []).append(row)
    rows = [[f"sm_{arch}", *_resources(found)] for arch, found in sorted(groups.items())]
    return markdown(("architecture", *AOT_COLUMNS), rows) if rows else None


def _compiled(results: Path) -> list[Record]:
    files = sorted(results.glob("aot*.json"))
    return [row for file in files for row in json.loads(file.read_text())["rows"] if "registers" in row]


AOT_COLUMNS = ("specialisations", "registers", "spills", "shared memory, KB at most", "tensor cores",
               "not to be shipped")  # fmt: skip


def _resources(found: list[Record]) -> list[str]:
    registers = [row["registers"] for row in found]
    cores = sorted({core for row in found for core, count in row["tensor_cores"].items() if count})
    return [
        str(len(found)),
        f"{min(registers)} to {max(registers)}",
        str(sum(row["spills"] for row in found)),
        f"{max(row['shared'] for row in found) / 1000:.0f}",
        ", ".join(cores),
        str(sum(bool(row["faults"]) for row in found)),
    ]
