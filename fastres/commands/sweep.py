"""``fastres sweep``: one recipe with several seeds and options."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from fastres.commands.options import DataCache, recipe
from fastres.train import Interrupted, machine
from fastres.train import sweep as sweeps
from fastres.train.requeue import check_requeue, requeue
from fastres.train.useless import check_given


def sweep(args: argparse.Namespace) -> int:
    """Train a recipe with several seeds and options, and print means and standard errors."""
    asked = recipe(args)
    base = asked.config
    for note in asked.notes:
        print(note, flush=True)
    if base.requeue:
        check_requeue(args.out)
    variants = sweeps.grid(sweeps.parse_setting(text) for text in args.set)
    if any("batch_size" in changes and "lr" not in changes for changes in variants.values()):
        print(f"the learning rate stays at {base.lr:g} for every batch size of --set", flush=True)
    if any("optimizer" in changes and "lr" not in changes for changes in variants.values()):
        print(f"the learning rate stays at {base.lr:g} for every optimizer of --set", flush=True)
    for changes in variants.values():
        check_given([base.replace(**changes)], changes)
    check_given([base.replace(**changes) for changes in variants.values()], asked.given)
    machine.treat_freed_memory(machine.pick_device(base.device), base.recompute)
    now = time.strftime("%Y%m%d-%H%M%S")
    folder = Path(args.out) if args.out else sweeps.new_folder(Path(f"sweeps/{asked.preset}-{now}"))
    try:
        outcomes = sweeps.sweep(
            base,
            variants,
            range(base.seed, base.seed + args.seeds),
            folder,
            DataCache(),
            lambda line: print(line, flush=True),
        )
    except Interrupted as stop:
        if base.requeue and (done := requeue(stop.signum)):
            raise Interrupted(stop.signum, f"{stop}; {done}") from None
        raise
    print(f"\n{(folder / 'summary.md').read_text('utf-8', 'surrogateescape')}\n{folder}")
    return int(any(outcome.failure is not None for outcome in outcomes))
