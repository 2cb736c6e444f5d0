"""What a GPU took for each launch beside what the model says of it: ``python -m bench.machine.compare step.json``.

Stage ``step`` of the campaign keeps, of variant ``fused Triton``, every kernel of a training step in order. The same
step is recorded here, and its launches must be those: the same kernels in the same order with the same grids. Like
launches are a row: measured, predicted, and what bytes or tensor cores alone would take; what lies above those is the
most that tuning can gain. The model's gap between launches is left out, as a kernel's measured time has none.

The model runs the code of the Triton that is installed: take the one that was measured. Where threads, registers or
shared memory are others than the GPU's, the output says so.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.machine.chips import CHIPS, Chip
from bench.machine.fused import Compiler, Timed, convolution_of, is_convolution
from bench.machine.measured import Pair, pairs
from bench.machine.tables import OPTIONAL
from bench.record import write_results
from bench.tables import markdown
from bench.workloads import GPU, IMAGE

WITH = (*OPTIONAL, "a", "dy", "shortcut_coef", "shortcut_sums")  # tensors that a launch may go without


def compared(case: str, found: dict[str, Any], programs: Compiler, chip: Chip) -> dict[str, Any]:
    """A case of stage ``step`` beside the model.

    Raises:
        ValueError: for a network that the campaign has not, and where its launches are others.
    """
    network = case.partition(" | ")[0]
    if network not in GPU:
        raise ValueError(f"{case}: the campaign has no such network")
    workload = replace(GPU[network], batch=found["batch"], image_size=found["image_size"])
    try:
        step = pairs(found["kernels"]["in_order"], workload, programs, chip)
    except ValueError as error:
        raise ValueError(f"{case}, {error}") from error
    return {
        "batch": workload.batch,
        "other_code": sum(not one.same_code for one in step),
        "total": {"kernel": "all", "launches": len(step), **_sum(step, chip)},
        "kinds": by_kind(step, chip),
        "classes": classes(step, workload.batch, chip),
    }


def by_kind(step: list[Pair], chip: Chip) -> list[dict[str, Any]]:
    """By kernel, window and stride, the longest first; seconds are of all."""
    groups: dict[str, list[Pair]] = {}
    for one in step:
        groups.setdefault(one.timed.kind, []).append(one)
    rows = [{"kernel": kind, "launches": len(same), **_sum(same, chip)} for kind, same in groups.items()]
    return sorted(rows, key=lambda row: -row["measured"])


def classes(step: list[Pair], images: int, chip: Chip) -> list[dict[str, Any]]:
    """Like launches once, the longest together first; seconds are of all of them.

    Args:
        images: a step's batch.
    """
    groups: dict[tuple, list[Pair]] = {}
    for one in step:
        groups.setdefault((one.timed.launch.specialisation, one.timed.work), []).append(one)
    rows = [{**_described(same[0], images), "launches": len(same), **_sum(same, chip)} for same in groups.values()]
    return sorted(rows, key=lambda row: -row["measured"])


def _sum(same: list[Pair], chip: Chip) -> dict[str, float]:
    each = [one.seconds(chip) for one in same]
    return {name: math.fsum(one[name] for one in each) for name in each[0]}


def _described(one: Pair, images: int) -> dict[str, Any]:
    specialisation = one.timed.launch.specialisation
    constants = specialisation.constants
    name = specialisation.kernel.removesuffix("_kernel")
    return {
        "kernel": name if one.timed.kind == "merging" else one.timed.kind,
        "channels": f"{constants.get('CIN', IMAGE)} to {constants['COUT']}"
        if "COUT" in constants
        else str(constants.get("C", "")),
        "of": _of(one.timed, images),
        "with": [name for name in WITH if f"{name}_ptr" in specialisation.pointers],
        "tile": [constants[f"BLOCK_{side}"] for side in "MNK" if f"BLOCK_{side}" in constants],
        "registers": one.program.registers,
        "resident": one.timed.prediction.resident if is_convolution(one.timed) else None,
    }


def _of(one: Timed, images: int) -> str:
    """The side of the images that are read; of a kernel that merges partial results how many there are."""
    integers = one.launch.integers
    if is_convolution(one):
        return f"{math.isqrt(convolution_of(one.launch).inputs // images)} px"
    if "M" in integers:
        return f"{math.isqrt(integers['M'] // images)} px"
    counts = {"rows": integers.get("T"), "parts": integers.get("parts")}
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count)


TIMES = ("measured", "model", "bytes alone", "tensor cores alone", "measured / model", "measured / alone",
         "ms above alone")  # fmt: skip
KINDS = ("kernel", "launches", *(f"{name}, ms" for name in TIMES[:4]), *TIMES[4:])
CLASSES = ("kernel", "channels", "of", "with", "tile", "registers", "programs an SM", "launches",
           *(f"{name}, us" for name in TIMES[:4]), *TIMES[4:])  # fmt: skip


def kind_cells(row: dict[str, Any]) -> list[str]:
    """A row of `KINDS`."""
    return [row["kernel"], str(row["launches"]), *_cells(row, 1e3, ".2f")]


def class_cells(row: dict[str, Any]) -> list[str]:
    """A row of `CLASSES`: microseconds are of one launch."""
    what = [row["kernel"], row["channels"], row["of"], " ".join(row["with"]), "x".join(map(str, row["tile"]))]
    counts = [str(row["registers"]), str(row["resident"] or ""), str(row["launches"])]
    return [*what, *counts, *_cells(row, 1e6 / row["launches"], ".1f")]


def _cells(row: dict[str, Any], unit: float, form: str) -> Iterator[str]:
    yield from (f"{unit * row[name]:{form}}" for name in ("measured", "model", "bytes", "tensor"))
    yield from (f"{row['measured'] / row[name]:.2f}" for name in ("model", "least"))
    yield f"{1e3 * (row['measured'] - row['least']):.2f}"


def summary(case: str, found: dict[str, Any], rows: int) -> str:
    """Both tables of a case as text, of like launches the first ``rows``."""
    other = f"{found['other_code']} launches have other code than is predicted here.\n\n" if found["other_code"] else ""
    kinds = markdown(KINDS, map(kind_cells, [*found["kinds"], found["total"]]))
    table = markdown(CLASSES, map(class_cells, found["classes"][:rows]))
    return f"\n{case}, batch {found['batch']}\n\n{other}{kinds}\n\n{table}\n"


def cases_of(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Cases of a result of stage ``step`` that have their launches in order.

    Raises:
        ValueError: where there are none.
    """
    found = {name: case for name, case in record.get("cases", {}).items() if "in_order" in case.get("kernels", {})}
    if not found:
        raise ValueError("no case has its launches in order, as stage step keeps them of fused Triton on a GPU")
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.machine.compare", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("file", type=Path, help="step.json of a campaign on a GPU")
    parser.add_argument("--arch", type=int, choices=CHIPS, default=90, help="(90)")
    parser.add_argument("--rows", type=int, default=25, help="of like launches that are printed (25)")
    parser.add_argument("--json", type=Path, help="result file, with all rows")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Compare, print, write the result."""
    args = parse(argv)
    programs, chip = Compiler(args.arch), CHIPS[args.arch]
    networks = {}
    try:
        record = json.loads(args.file.read_text())
        for case, found in cases_of(record).items():
            networks[case] = compared(case, found, programs, chip)
            print(summary(case, networks[case], args.rows), flush=True)
    except ValueError as error:
        sys.exit(f"{args.file}: {error}")
    if args.json:
        measured = {name: record[name] for name in ("device", "date", "commit", "versions")}
        write_results(
            args.json, {"arch": args.arch, "chip": chip._asdict(), "measured": measured, "networks": networks}
        )


if __name__ == "__main__":
    main()
