"""Results of a campaign's slices as one set: ``python -m bench.merge FOLDER ...``.

Stage files of one device are joined case by case; of two results of a case the later one is taken, but none that failed
instead of one that did not. They go to ``bench/results/<device>-<date>/`` or ``--out``, from where later slices go on
and `bench.report` reads, with the newest archive of compiled kernels (`bench.archive`).
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import archive
from bench.record import RESULTS
from bench.slices import STAGES
from fastres.atomic import atomic_write
from fastres.errors import FastresError

Record = dict[str, Any]


def load(path: Path) -> Record | None:
    """A stage's record; None: there is none, or what is there is not one."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("cases"), dict) else None


def merged(records: Sequence[Record]) -> Record:
    """One record of all cases, with the circumstances of the newest.

    Raises:
        FastresError: for records of several devices.
    """
    if len(devices := sorted({record["device"] for record in records})) > 1:
        raise FastresError(f"results of several devices are not one set: {', '.join(devices)}")
    records = sorted(records, key=lambda record: record["date"])
    cases: dict[str, Any] = {}
    attempts: dict[str, int] = {}
    for record in records:
        for name, case in record["cases"].items():
            if "error" not in case or "error" in cases.get(name, {"error": ""}):
                cases[name] = case
        for name, count in record.get("attempts", {}).items():
            attempts[name] = max(count, attempts.get(name, 0))
    complete = any(record["complete"] for record in records)
    open_attempts = {name: count for name, count in attempts.items() if name not in cases}
    stopped = None if complete else records[-1]["stopped"]
    return {**records[-1], "complete": complete, "stopped": stopped, "cases": cases, "attempts": open_attempts}


def merge_folders(folders: Iterable[Path], out: Path, stages: Iterable[str] = STAGES) -> list[str]:
    """Join stage files, those in ``out`` too, and write them there; the stages that there was anything of.

    Raises:
        FastresError: see `merged`.
    """
    found = []
    for stage in stages:
        paths = dict.fromkeys(folder / f"{stage}.json" for folder in (*folders, out))
        if records := [record for path in paths if (record := load(path)) is not None]:
            write(out / f"{stage}.json", merged(records))
            found.append(stage)
    return found


def write(path: Path, record: Record) -> None:
    """A record as it is, with the circumstances that it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write((json.dumps(record, indent=1, allow_nan=False) + "\n").encode())


def folder_name(device: str, date: str) -> str:
    """``<device>-<yyyymmdd>`` of a device's name and a date in ISO's form."""
    return f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}-{date[:10].replace('-', '')}"


def main(argv: list[str] | None = None) -> int:
    """Merge folders of slices."""
    parser = argparse.ArgumentParser(prog="python -m bench.merge", description=__doc__.split("\n\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="that slices brought back")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="[bench/results/<device>-<date>]")
    args = parser.parse_args(argv)
    records = [record for folder in args.folders for stage in STAGES if (record := load(folder / f"{stage}.json"))]
    try:
        if not records:
            raise FastresError(f"no stage's file in {', '.join(map(str, args.folders))}: name folders of slices")
        newest = max(records, key=lambda record: record["date"])
        out = args.out or RESULTS / folder_name(newest["device"], newest["date"])
        stages = merge_folders(args.folders, out)
    except FastresError as error:
        print(f"python -m bench.merge: error: {error}", file=sys.stderr)
        return 2
    for folder in args.folders:
        for packed in archive.of(folder):
            if folder.resolve() != out.resolve():
                shutil.copy2(packed, out / packed.name)
    print(f"{out}: {', '.join(stages)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
