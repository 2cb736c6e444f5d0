"""The whole campaign of faults, see `faults`."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from bench.record import RESULTS, write_results
from bench.tables import markdown
from faults import damage, runs
from faults.child import OUTCOMES, table_row


def damages(folder: Path, times: int, seed: int = 0) -> list[dict[str, Any]]:
    """Flip, cut, drop and repeat bytes of every kind of file that is read."""
    return [
        table_row(f"damaged {kind}", try_kind(folder / kind.replace(" ", "-"), times, seed))
        for kind, try_kind in damage.KINDS.items()
    ]


def within(folder: Path, name: str) -> Path:
    """A folder of one fault."""
    (folder / name).mkdir()
    return folder / name


def main() -> None:
    """Try all faults, print the table and record it."""
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="random moments [200]")
    parser.add_argument("--operations", type=int, help="file operations to kill before [all]")
    parser.add_argument("--damages", type=int, default=500, help="of each kind of file [500]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "faults.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        rows = [
            runs.kills(folder, args.kills, args.seed),
            runs.operations(within(folder, "operations"), args.operations),
        ]
        rows += [
            runs.size_limit(folder),
            runs.read_only(folder),
            runs.two_runs(folder),
            runs.hostile_folders(within(folder, "hostile")),
        ]
        rows += [runs.lost(within(folder, "lost")), runs.other_data(within(folder, "data"))]
        if (row := runs.full_file_system(folder)) is not None:
            rows.append(row)
        rows += [runs.clock_jumps(folder, seed=args.seed), *damages(folder, args.damages, args.seed)]
    columns = ("fault", "tried", *OUTCOMES)
    print(markdown(columns, [[str(row[column]) for column in columns] for row in rows]))
    for row in rows:
        for reason in row["reasons"]:
            print(f"{row['fault']}: {reason}")
    write_results(args.out, {"seed": args.seed, "faults": rows})


if __name__ == "__main__":
    main()
