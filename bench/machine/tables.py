"""Predictions as rows and as text."""

from __future__ import annotations

import math
from typing import Any

from bench.machine.chips import LAUNCH, Chip
from bench.machine.fused import Timed
from bench.machine.pipes import WARP
from bench.machine.program import Program
from bench.tables import markdown
from bench.workloads import IMAGE

OPTIONAL = ("coef", "shortcut", "residual", "mean", "abc", "mask", "sums")  # tensors that a launch may go without
MOST_ROWS = 24


def convolution_row(same: list[Timed], program: Program, chip: Chip) -> dict[str, Any]:
    """Like launches of a convolution as JSON."""
    one = same[0]
    constants = one.launch.specialisation.constants
    busy = sorted(one.prediction.busy.items(), key=lambda each: -each[1])[:4]
    return {
        "kernel": one.kind,
        "cin": constants.get("CIN", IMAGE),
        "cout": constants["COUT"],
        "with": [name for name in OPTIONAL if f"{name}_ptr" in one.launch.specialisation.pointers],
        "tile": [constants[f"BLOCK_{side}"] for side in "MNK"],
        "warps": program.warps,
        "registers": program.registers,
        "shared": program.shared,
        "resident": one.prediction.resident,
        "programs": one.work.programs,
        "trips": one.work.trips,
        "launches": len(same),
        "seconds": one.seconds,
        "bytes": one.work.bytes / chip.bandwidth + LAUNCH,
        "tensor": one.work.operations / chip.peak,
        "share": one.prediction.share,
        "busy": {name: round(value, 3) for name, value in busy},
    }


CONVOLUTIONS = ("kernel", "channels", "with", "tile", "registers", "programs an SM", "launches", "us each",
                "bytes alone", "tensor cores alone", "share", "busiest")  # fmt: skip


def convolution_cells(row: dict[str, Any]) -> list[str]:
    """A row of `CONVOLUTIONS`."""
    return [
        row["kernel"],
        f"{row['cin']} to {row['cout']}",
        " ".join(row["with"]),
        "x".join(map(str, row["tile"])),
        str(row["registers"]),
        str(row["resident"]),
        str(row["launches"]),
        *(f"{1e6 * row[name]:.0f}" for name in ("seconds", "bytes", "tensor")),
        f"{row['share']:.0%}",
        ", ".join(f"{name} {share:.0%}" for name, share in list(row["busy"].items())[:2]),
    ]


ENOUGH = {"tensor": 0.6, "bytes": 0.8}  # of what binds a convolution: the tensor cores' peak, the memory's bandwidth
SATURATED = 0.75  # share of the time from which a pipe leaves little to another program


def enough(row: dict[str, Any]) -> bool:
    """Whether a convolution reaches `ENOUGH` of what binds it."""
    return row["share"] >= ENOUGH["tensor" if row["tensor"] > row["bytes"] else "bytes"]


def why_not(row: dict[str, Any], chip: dict[str, Any]) -> str:
    """What keeps a convolution from `ENOUGH`, the first of these that applies; empty: it reaches it.

    The gap to the next launch; programs that do not fill the GPU, or a last round of few; a pipe that is nearly full;
    or else waits, of which more programs at once would hide more.
    """
    if enough(row):
        return ""
    gap, at_once = LAUNCH / row["seconds"], chip["sms"] * row["resident"]
    rounds = row["programs"] / at_once
    name, share = next(iter(row["busy"].items()))
    if gap >= 0.2:
        return f"the gap between launches is {gap:.0%}"
    if rounds < 0.9:
        return f"{row['programs']} programs, {at_once} run at once"
    if rounds < 4 and rounds / math.ceil(rounds) < 0.8:
        return f"{rounds:.1f} rounds of programs: the last one is not full"
    if share >= SATURATED:
        return f"{name} {share:.0%}"
    further = row["registers"] * row["warps"] * WARP * (row["resident"] + 1)
    limit = "registers" if further > chip["registers"] else "shared memory"
    return f"waits: {row['resident']} at once, as many as {limit} admit, {name} {share:.0%}"


SLOW = ("convolution", "channels", "with", "launches", "us each", "bytes or tensor cores alone, us", "share", "why not")


def slow_rows(found: dict[str, Any]) -> list[list[str]]:
    """Rows of `SLOW`: the convolutions below `ENOUGH`, the longest together first."""
    return [
        [
            row["kernel"],
            f"{row['cin']} to {row['cout']}",
            " ".join(row["with"]),
            str(row["launches"]),
            f"{1e6 * row['seconds']:.0f}",
            f"{1e6 * max(row['bytes'], row['tensor']):.0f}",
            f"{row['share']:.0%}",
            why_not(row, found["chip"]),
        ]
        for row in found["convolutions"]
        if not enough(row)
    ]


KINDS = ("kernel", "launches", "ms", "share of the step", "bytes or tensor cores alone, ms")


def kind_rows(found: dict[str, Any]) -> list[list[str]]:
    """Rows of `KINDS`."""
    total = math.fsum(one["seconds"] for one in found["kinds"])
    return [
        [one["kind"], str(one["launches"]), f"{1e3 * one['seconds']:.2f}", f"{one['seconds'] / total:.0%}",
         f"{1e3 * one['least']:.2f}"]
        for one in found["kinds"]
    ]  # fmt: skip


STEPS = ("network", "GPU", "Triton alone, ms", "with timed choices", "torch.compile", "eager",
         "torch.compile / Triton alone", "torch.compile / with timed choices", "eager / with timed choices",
         "bytes and tensor cores alone, ms")  # fmt: skip


def step_cells(found: dict[str, Any]) -> list[str]:
    """A row of `STEPS`: each a range over the model's variants and both ends of the library's."""
    steps = list(found["steps"].values())
    return [
        f"{found['network']}, {found['batch']} images",
        found["chip"]["name"],
        _milliseconds(steps, "Triton"),
        *(_milliseconds(steps, f"{kind} tuned", f"{kind} plain") for kind in ("fused", "compiled", "eager")),
        _ratios(steps, "compiled", ["Triton", "Triton"]),
        _ratios(steps, "compiled", ["fused tuned", "fused plain"]),
        _ratios(steps, "eager", ["fused tuned", "fused plain"]),
        f"{1e3 * found['bytes']:.1f}",
    ]


def _milliseconds(steps: list[dict[str, float]], *names: str) -> str:
    return _range([1e3 * step[name] for step in steps for name in names], "{:.1f}")


def _ratios(steps: list[dict[str, float]], peer: str, ours: list[str]) -> str:
    pairs = zip((f"{peer} tuned", f"{peer} plain"), ours)
    return _range([step[theirs] / step[our] for theirs, our in pairs for step in steps], "{:.2f}x")


def _range(values: list[float], form: str) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


def summary(found: dict[str, Any]) -> str:
    """All tables of a network as text."""
    return (
        f"\n{found['network']}, batch {found['batch']}, {found['dtype']}, {found['chip']['name']}: predictions of a "
        f"model, nothing was timed\n\n{markdown(STEPS, [step_cells(found)])}\n\n{markdown(KINDS, kind_rows(found))}\n\n"
        f"{markdown(CONVOLUTIONS, [convolution_cells(row) for row in found['convolutions'][:MOST_ROWS]])}\n"
    )
