"""Sections that nothing was run for on the device: predictions, counts of bytes, compiled machine code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median

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
        "**Lower bounds, not measurements**: no GPU was used, and no kernel reaches its roof. "
        f"{record['dtype']}; counted bytes and operations of every launch under a roof of {assumed} "
        f"({shares}), {1e6 * machine['launch']:.0f} us a launch.\n\n"
        f"{markdown(roofline.COLUMNS, roofline.rows(record['predictions'], record['batches']))}"
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
        title = f"{network}, {counted['batch']} images of {counted['image']}x{counted['image']}, {record['dtype']}"
        where = f"**{title}**, static count, commit {record['commit']}."
        columns = ("first block", "blocks", "input CxHxW", *TRAFFIC_COLUMNS)
        text.append(f"{where}\n\n{markdown(columns, rows)}")
    return "\n\n".join(text) or None


def network_traffic_section(results: Path) -> str | None:
    """Counted bytes of a step, a row a network."""
    rows = []
    for network, _, counted in _networks(results):
        total = _total([whole for _, whole in counted["stages"]])
        rows.append([f"{network}, {counted['batch']} images of {counted['image']} pixels", *_bytes(total)])
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
            variant: sum(whole["moved"][kind] for _, whole in counted["stages"]) / counted["batch"]
            for kind, variant in roofline.KINDS.items()
        }
        for _, _, counted in _networks(results)
    }


def machine_code_section(results: Path) -> str | None:
    """What the compiled kernels need, by kernel and architecture, of the newest Triton; read from machine code, nothing
    ran."""
    records = _compiled(results)
    if not records:
        return None
    groups: dict[tuple[str, str], list[Record]] = {}
    for row in records[-1]["rows"]:
        groups.setdefault((row["kernel"], _architecture(row["arch"])), []).append(row)
    ordered = sorted(groups, key=lambda group: (group[0], _place(group[1])))
    rows = [[kernel, arch, *_resources(groups[kernel, arch])] for kernel, arch in ordered]
    return markdown(("kernel", "architecture", *AOT_COLUMNS), rows)


def _place(arch: str) -> tuple[bool, int]:
    return not arch.startswith("sm"), int("".join(filter(str.isdigit, arch)))


def architectures_section(results: Path) -> str | None:
    """`machine_code_section`, all kernels of an architecture in a row, of each Triton; what was compiled of what is
    planned comes first, so that a part is not taken for all."""
    rows = []
    for record in _compiled(results):
        for count in sorted(record["coverage"], key=_order):
            arch, precision, first = count["arch"], count["precision"], count["configurations"] == "first"
            found = [row for row in record["rows"] if (row["arch"], row["planned"]) == (arch, precision)]
            found = [row for row in found if row["first"] == first]
            covered = f"{count['compiled']} of {count['of']}"
            rows.append(
                [_architecture(arch), precision, count["configurations"], record["versions"]["triton"], covered]
                + (_resources(found)[1:] if found else [""] * (len(AOT_COLUMNS) - 1))
            )
    columns = "architecture", "dtype", "configurations", "Triton", "compiled", *AOT_COLUMNS[1:]
    return markdown(columns, rows) if rows else None


def _compiled(results: Path) -> list[Record]:
    """The results of `bench.aot`, by version of Triton."""
    records = [json.loads(file.read_text()) for file in results.glob("aot*.json")]
    return sorted(records, key=lambda record: [int(part) for part in record["versions"]["triton"].split(".")])


def _order(count: Record) -> tuple:
    return count["configurations"] != "first", count["precision"], _place(_architecture(count["arch"]))


def _architecture(arch: int | str) -> str:
    return f"sm_{arch}" if isinstance(arch, int) else arch


AOT_COLUMNS = ("specialisations", "registers", "spills", "shared memory, KB at most", "tensor cores",
               "share of its bound, median", "not to be shipped")  # fmt: skip


def _resources(rows: list[Record]) -> list[str]:
    found = [row for row in rows if "registers" in row]  # others did not compile
    registers = [row["registers"] for row in found]
    cores = sorted({core for row in found for core, count in row["tensor_cores"].items() if count})
    shares = [row["share"] for row in found if row.get("share") is not None]
    return [
        str(len(found)),
        f"{min(registers)} to {max(registers)}" if found else "",
        str(sum(row["spills"] for row in found)),
        f"{max((row['shared'] for row in found), default=0) / 1000:.0f}",
        ", ".join(cores),
        f"{median(shares):.0%} of {len(shares)}" if shares else "",
        str(sum(bool(row["faults"]) for row in rows)),
    ]
