"""``fastres train``: one run, alone or as one of several ranks."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastres.commands.options import given_options, load_data, recipe, say
from fastres.errors import FastresError
from fastres.models.registry import accepted_options
from fastres.train import Interrupted, TrainConfig, Trainer, machine
from fastres.train.callbacks import Callback, load_callback
from fastres.train.distributed import Onlooker, Ranks, joined, rank_device
from fastres.train.facts import run_facts
from fastres.train.final_test import final_test
from fastres.train.identity import CHANGED_BY_RESUME, PLACE, check_same_weights, difference
from fastres.train.lr_find import range_test, write_range_test
from fastres.train.pretrained import check_fit, settled
from fastres.train.requeue import check_requeue, requeue
from fastres.train.run_folder import RunFolder, read_config, saved_config, saved_launch
from fastres.train.useless import check_given


def train(args: argparse.Namespace) -> int:
    """Train a network and leave a run folder; `torchrun -m fastres.cli train` trains it with several processes."""
    callbacks = [load_callback(text) for text in args.callback]
    with joined() as ranks:
        if args.lr_find is not None:
            return lr_find(ranks, args)
        return train_with(ranks, args, callbacks)


def lr_find(ranks: Ranks, args: argparse.Namespace) -> int:
    """Print and write how the loss depends on the learning rate, with the options of the run that is meant."""
    named = [f"--{name}" for name in ("out", "resume", "callback") if getattr(args, name)]
    if ranks.count > 1 or named:
        raise FastresError(
            f"--lr-find trains nothing{f': leave out {named[0]}' if named else ' and is of one process'}"
        )
    config = plan(args, ranks).config
    machine.treat_freed_memory(machine.pick_device(config.device), config.recompute)
    trainer = Trainer(config, load_data(config), Onlooker(args.lr_find))
    found = range_test(trainer)
    suggestion = found.suggestion
    write_range_test(args.lr_find, found, f"{config.model}, {config.optimizer}, {trainer.dataset.label}")
    print(
        f"suggestion: --lr {suggestion:.2g}, by which the loss has fallen half of its way; it is least at "
        f"{found.best:.2g} of {len(found.rates)} rates from {found.rates[0]:.0e} to {found.rates[-1]:.2g}; "
        f"{args.lr_find}"
    )
    return 0


@dataclass(frozen=True)
class Plan:
    """The run that is asked for: its options, its folder, whether that may hold its beginning, and whether it was
    named.
    """

    config: TrainConfig
    path: Path
    begun: bool
    named: bool = True

    def folder(self) -> RunFolder:
        """The folder, taken."""
        return RunFolder(self.path, self.begun) if self.named else RunFolder.new(self.path)


def plan(args: argparse.Namespace, ranks: Ranks) -> Plan:
    """What is to be done.

    A folder may hold the run's beginning where it is to be resumed, or where this very launch began it: ``torchrun``
    restarted its processes, machines joined or left, or SLURM started the job again.

    Raises:
        FastresError: for options that a resumed run cannot change, or that a launch began its run without.
    """
    if args.resume is not None:
        given = given_options(args)
        fixed = sorted(set(given) - CHANGED_BY_RESUME)
        fixed += [name for name in ("preset", "config", "out") if getattr(args, name) is not None]
        if fixed:
            raise FastresError(
                f"--{fixed[0].replace('_', '-')} cannot change in a resumed run: leave it out, or start a new run"
            )
        if given.get("requeue"):
            check_requeue(args.resume)
        return Plan(saved_config(args.resume).replace(**given), Path(args.resume), True)
    asked = recipe(args)
    check_given([asked.config], asked.given)
    config, given = settled(asked.config), asked.given
    check_fit(config)
    for note in asked.notes:
        print(note, flush=True)
    if config.requeue:
        check_requeue(args.out)
    if config.sync_bn and "sync_bn" in given and "WORLD_SIZE" not in os.environ:
        raise FastresError("--sync-bn does nothing in one process: start with torchrun, or leave it out")
    if args.out is None:
        if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
            raise FastresError("torchrun --max-restarts needs --out FOLDER: a restarted job finds its checkpoint there")
        return Plan(config, Path(f"runs/{config.model}-{time.strftime('%Y%m%d-%H%M%S')}"), False, named=False)
    path = Path(args.out)
    if not ranks.launch.began(saved_launch(path)):
        return Plan(config, path, False)
    saved = saved_config(path)
    if differs := difference(saved, config):
        raise FastresError(f"run folder {path} holds a run with {differs}: choose another --out")
    check_same_weights(read_config(path), config, path)
    return Plan(saved.replace(**{name: getattr(config, name) for name in PLACE}), path, True)


def train_with(ranks: Ranks, args: argparse.Namespace, callbacks: Sequence[Callback] = ()) -> int:
    """Train as one of the ranks; only the first one prints and writes."""
    asked = ranks.of_first(lambda: plan(args, ranks))
    config = asked.config
    device = machine.pick_device(rank_device(config.device, ranks))
    accepted_options(config.model)  # an unknown model should not wait for the data
    machine.treat_freed_memory(device, config.recompute)
    folder = asked.folder() if ranks.first else None
    path = ranks.of_first(lambda: folder.path if folder else asked.path)
    at = folder or Onlooker(path)
    try:
        with ranks.going_on(path):
            began = time.perf_counter()
            dataset = load_data(config, ranks)
            reading = time.perf_counter() - began
            trainer = Trainer(config, dataset, at, ranks=ranks, callbacks=callbacks)
            if ranks.of_first(at.begun):
                trainer.resume()
                if note := going_on_longer(trainer):
                    say(ranks, note)
            elif asked.begun:
                say(ranks, f"{path} was stopped before its first checkpoint: starting again")
            if ranks.first:
                describe(trainer)
            try:
                history = trainer.fit()
            except Interrupted as stop:
                if config.requeue and ranks.first and (done := requeue(stop.signum)):
                    raise Interrupted(stop.signum, f"{stop}; {done}") from None
                raise
            tested = final_test(trainer)
    finally:
        at.close()
    best = trainer.best or history[-1]
    say(
        ranks,
        f"validation accuracy {history[-1]['val_accuracy']:.2%} on {trainer.dataset.label}, "
        f"best {best['val_accuracy']:.2%} in epoch {best['epoch']}; {history[-1]['seconds']:.1f} s; {path}",
    )
    say(ranks, times(trainer, reading))
    for line in tested:
        say(ranks, line)
    return 0


def times(trainer: Trainer, reading: float) -> str:
    """A line on what the seconds went into; ``reading`` are those of the data, which no other has."""
    last = trainer.history[-1]
    first = "" if trainer.first_step is None else f" ({trainer.first_step:.1f} s the first step, with what it compiles)"
    return (
        f"{last['train_seconds']:.1f} s of training{first}, {last['seconds'] - last['train_seconds']:.1f} s of "
        f"validation; before them {reading:.1f} s of reading the data"
    )


def going_on_longer(trainer: Trainer) -> str | None:
    """A line on the schedule of a run that had come to its end and goes on; None: it has not, or does not."""
    config, saved = trainer.config, saved_config(trainer.folder.path) if trainer.ranks.first else trainer.config
    if (saved.epochs, saved.steps) == (config.epochs, config.steps):
        return None
    return (
        f"going on to step {trainer.total_steps} with the schedule of a run of that length: the next learning rate is "
        f"{config.lr * trainer.lr_factor(trainer.step):.3g}"
    )


def describe(trainer: Trainer) -> None:
    """Print what is about to run and save it beside the options."""
    config, dataset, facts = trainer.config, trainer.dataset, run_facts(trainer)
    trainer.folder.write_config(config, {**facts, "launch": trainer.ranks.launch.facts()})
    print(
        f"{config.model}, {facts['parameters']:,} parameters | {dataset.label}, {len(dataset.train)} + "
        f"{len(dataset.validation)} images{f', {len(dataset.test)} for the test' if dataset.val is not None else ''}, "
        f"{trainer.image_size}x{trainer.image_size} | {facts['device']}, {facts['dtype']}, {facts['backend']}"
        f"{f', {trainer.ranks.count} ranks' if trainer.ranks.count > 1 else ''} | "
        f"{trainer.total_steps} steps, {facts['flops'] / 1e15:.3g} PFLOP | {trainer.folder.path}",
        flush=True,
    )
