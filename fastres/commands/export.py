"""``fastres export``: a trained network as a file of another program's."""

from __future__ import annotations

import argparse

from fastres.commands.options import check_writable
from fastres.export import command


def export(args: argparse.Namespace) -> int:
    """Write a trained network for other programs."""
    if args.out.suffix:
        check_writable("--out", args.out)
    return command.export(args)
