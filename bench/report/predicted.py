"""Sections of the model's predictions: `bench.machine`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.machine import tables
from bench.report.common import Record, read
from bench.tables import markdown

LABEL = "**Predictions of a model, not measurements.**"
# Launches of ResNet-50 at 224 pixels that test the model most sharply, since it predicts far more than their bytes
# take.
SHARPEST = (("conv 1x1", 64, 256), ("conv_wgrad 3x3", 256, 256))


def steps_section(results: Path) -> str | None:
    """Step times and ratios of the networks, each a range."""
    found = list(_records(results))
    if not found:
        return None
    rows = [tables.step_cells(record) for record in found]
    return (
        f"{LABEL} {found[0]['dtype']}; ms a training step of stem and blocks, and ratios "
        f"above 1 where the fused step is faster. {_meaning(found)}\n\n{markdown(tables.STEPS, rows)}"
    )


def _meaning(found: list[Record]) -> str:
    ranks = max(record["ranks"] for record in found)
    most = "the first configuration" if ranks == 1 else f"{ranks} configurations"
    ways = ", the other ways in which gradients share what they read" if any("ways" in one for one in found) else ""
    under = "; each under three sets of assumptions" if any(len(record["steps"]) > 1 for record in found) else ""
    return (
        "A range is between a library whose convolutions are the model's plain products in their best tiles and one in "
        f"tiles of at most 128 x 128{under}. Timed choices are between {most}{ways} and the library. Absolute times "
        "may be off by a quarter and more, ratios by as much: one between 0.8x and 1.25x says that neither is clearly "
        "faster."
    )


RUNS = ("preset", "GPU", "steps", "stem and blocks, ms a step", "optimizer, ms", "pool, last layer and loss, ms",
        "batch, ms", "seconds of the run")  # fmt: skip


def runs_section(results: Path) -> str | None:
    """Seconds of whole training runs, validation left out, with what a step consists of."""
    rows = [
        [
            f"`{run['preset']}`",
            record["chip"]["name"],
            str(run["steps"]),
            _range(run["blocks"], 1e3, ".2f"),
            *(f"{1e3 * run['beside'][what]:.2f}" for what in ("optimizer", "head and loss", "batch")),
            _range(run["seconds"], 1, ".1f"),
        ]
        for record in _runs(results)
        for run in record["runs"]
    ]
    if not rows:
        return None
    return (
        f"{LABEL} bfloat16, one CUDA graph a step; without validation, compiling and reading the data. A step's range "
        "is from timed choices to Triton alone; that of a run is a quarter wider either way, as much as the model's "
        "absolute times may be off. The optimizer's time is mostly Muon's matrix products, fifteen launches for all "
        "kernels of as many outputs."
        f"\n\n{markdown(RUNS, rows)}"
    )


def runs_sentence(results: Path) -> str | None:
    """The same in a line."""
    lines = []
    for record in _runs(results):
        each = ", ".join(f"`{run['preset']}` {_range(run['seconds'], 1, '.1f')} s" for run in record["runs"])
        lines.append(f"On one {record['chip']['name']} a model predicts {each} of training.")
    return " ".join(lines) or None


def _range(ends: dict[str, float], factor: float, form: str) -> str:
    low, high = (format(factor * ends[end], form) for end in ("low", "high"))
    return low if low == high else f"{low} to {high}"


def _runs(results: Path) -> Iterator[Record]:
    for path in sorted(results.glob("runs-sm*.json")):
        if record := read(path):
            yield record


def kernels_section(results: Path) -> str | None:
    """The launches of each network by kernel."""
    text = [
        f"**{record['network']}**, {record['chip']['name']}, Triton alone, first configurations\n\n"
        f"{markdown(tables.KINDS, tables.kind_rows(record))}"
        for record in _records(results)
    ]
    return f"{LABEL}\n\n" + "\n\n".join(text) if text else None


def slow_section(results: Path) -> str | None:
    """Every convolution below 60% of the tensor cores' peak or 80% of the bandwidth, whichever binds it, and why."""
    text = []
    for record in _records(results):
        rows, count = tables.slow_rows(record), len(record["convolutions"])
        reached = f"{count - len(rows)} of {count} kinds of launches reach it"
        text.append(f"**{record['network']}**, {record['chip']['name']}: {reached}\n\n{markdown(tables.SLOW, rows)}")
    return f"{LABEL} First configurations.\n\n" + "\n\n".join(text) if text else None


def redesign_section(results: Path) -> str | None:
    """The launches of a step by kernel before the kernels were redesigned for sm_90, and as they are."""
    before = read(results / "before-redesign-sm90.json")
    if not before:
        return None
    text = []
    for record in _records(results):
        if (old := before["networks"].get(record["network"])) is None or record["arch"] != 90:
            continue
        kinds = [{one["kind"]: one for one in found["kinds"]} for found in (old, record)]
        rows = [
            [kind, *(cell for found in kinds for cell in _of_kind(found.get(kind)))] for kind in kinds[0] | kinds[1]
        ]
        total = [sum(one["seconds"] for one in found.values()) for found in kinds]
        count = [sum(one["launches"] for one in found.values()) for found in kinds]
        rows.append(["all", *(cell for pair in zip(count, total) for cell in (str(pair[0]), f"{1e3 * pair[1]:.2f}"))])
        text.append(
            f"**{record['network']}**, {record['chip']['name']}, Triton alone: commit {old['commit']}, and "
            f"{record['commit']}\n\n{markdown(REDESIGN, rows)}"
        )
    return f"{LABEL}\n\n" + "\n\n".join(text) if text else None


REDESIGN = ("kernel", "launches before", "ms before", "launches", "ms")


def _of_kind(one: Record | None) -> list[str]:
    return ["", ""] if one is None else [str(one["launches"]), f"{1e3 * one['seconds']:.2f}"]


def sharpest_section(results: Path) -> str | None:
    """The launches by which an hour on a GPU would test the model."""
    rows = [
        [f"{record['network']}, {record['chip']['name']}", *tables.convolution_cells(row)]
        for record in _records(results)
        for row in _sharp(record)
    ]
    columns = ("network", *tables.CONVOLUTIONS)
    return f"{LABEL} Batch 256.\n\n{markdown(columns, rows)}" if rows else None


def _sharp(record: Record) -> Iterator[dict[str, Any]]:
    if record["network"] != "resnet50":
        return
    for kernel, cin, cout in SHARPEST:
        same = [
            row for row in record["convolutions"] if (row["kernel"], row["cin"], row["cout"]) == (kernel, cin, cout)
        ]
        yield from same[:1]


def _records(results: Path) -> Iterator[Record]:
    for path in sorted(results.glob("machine-*.json")):
        if record := read(path):
            yield record
