"""Collects training runs into one result file: options, data, device and every epoch's row.

python -m bench.runs runs/A runs/B --out bench/results/accuracy.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench.record import RESULTS, write_results

PLACES = ("data", "data_root")  # options that name a place on one machine


def read_run(folder: Path) -> dict[str, Any]:
    """The options, facts and rows of a run folder."""
    config = json.loads((folder / "config.json").read_text())
    for name in PLACES:
        config["options"].pop(name, None)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {"name": folder.name, **config, "epochs": rows}


def main(argv: list[str] | None = None) -> None:
    """Read the runs, print their last rows, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, default=RESULTS / "accuracy.json", help="result file")
    args = parser.parse_args(argv)
    runs = [read_run(folder) for folder in args.runs]
    for run in runs:
        last = run["epochs"][-1]
        print(f"{run['name']}: {last['val_accuracy']:.2%} on {run['data']} after {last['epoch']} epochs")
    write_results(args.out, {"runs": runs})


if __name__ == "__main__":
    main()
