"""``fastres bench``: one training step, timed."""

from __future__ import annotations

import argparse

from fastres.commands.options import check_writable
from fastres.measure import command


def bench(args: argparse.Namespace) -> int:
    """Time a training step of a network: eager, compiled, fused."""
    if args.json is not None:
        check_writable("--json", args.json)
    return command.bench(args)
