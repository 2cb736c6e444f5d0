"""The command line: ``fastres train``, ``sweep``, ``eval``, ``predict``, ``export``, ``models`` and ``bench``."""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import fastres
from fastres import data
from fastres import predict as predict_command
from fastres.cache import cache_folder, clear, kept, private_folder
from fastres.errors import FastresError
from fastres.export import command as export_command
from fastres.measure import command as measure_command
from fastres.models import describe_models
from fastres.models.registry import accepted_options
from fastres.output import lasting_output
from fastres.train import PRESETS, Interrupted, TrainConfig, Trainer, machine, preset, report
from fastres.train import sweep as sweeps
from fastres.train.confusion import confusion, write_confusion
from fastres.train.distributed import ALONE, Onlooker, Ranks, joined, rank_device
from fastres.train.evaluate import evaluate
from fastres.train.facts import run_facts
from fastres.train.final_test import final_test
from fastres.train.identity import CHANGED_BY_RESUME, PLACE, difference
from fastres.train.memory import is_out_of_memory
from fastres.train.presets import rate_note
from fastres.train.run_folder import RunFolder, saved_config, saved_launch
from fastres.train.signals import terminate_orderly
from fastres.train.trained import find_checkpoint, load_trained
from fastres.train.useless import check_given

OPTIONS = {f.name: f for f in dataclasses.fields(TrainConfig)}
DATA_OPTIONS = (  # those that `load_data` reads
    "data", "data_root", "image_size", "val_share", "val_seed", "skip_bad", "limit_train", "limit_test",
)  # fmt: skip


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line, and that takes no part of an option's name for the whole."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def positive(text: str) -> int:
    """An integer of at least 1, as a type for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return int(text)


def add_options(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Add configuration options to a command; one that is not given leaves no trace in the result."""
    for name in names:
        meta, default = OPTIONS[name].metadata, OPTIONS[name].default
        flag, help = "--" + name.replace("_", "-"), f"{meta['help']} [{default}]"
        if meta["kind"] is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=help)
        else:
            parser.add_argument(
                flag, type=meta["kind"], choices=meta["choices"], default=argparse.SUPPRESS, help=help,
                metavar=None if meta["choices"] else meta["kind"].__name__.upper(),
            )  # fmt: skip


def preset_of(args: argparse.Namespace) -> str:
    """The recipe that the options start from."""
    return "fast" if args.preset is None else args.preset


def given_options(args: argparse.Namespace) -> dict:
    """The configuration options that stood on the command line."""
    return {name: value for name, value in vars(args).items() if name in OPTIONS}


def load_data(config: TrainConfig, ranks: Ranks = ALONE) -> data.Dataset:
    """Load a dataset, say which one it is, and keep a fixed random part of it where that was asked for."""
    dataset = ranks.local_first(
        lambda: data.load(
            config.data,
            root=config.data_root,
            image_size=config.image_size,
            say=partial(say, ranks),
            val_share=config.val_share,
            val_seed=config.val_seed,
            skip_bad=config.skip_bad,
        )
    )
    dataset = data.limit(dataset, config.limit_train, config.limit_test)
    if others := ranks.others_than_first(dataset.digest):
        raise FastresError(
            f"rank {others[0]} has other images or labels than rank 0, here {dataset.label!r}: give all machines the same data"
        )
    return dataset


def say(ranks: Ranks, line: str) -> None:
    """Print a line once, not once a rank."""
    if ranks.first:
        print(line, flush=True)


def train(args: argparse.Namespace) -> int:
    """Train a network and leave a run folder; `torchrun -m fastres.cli train` trains it with several processes."""
    with joined() as ranks:
        return train_with(ranks, args)


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
    given = given_options(args)
    if args.resume is not None:
        fixed = sorted(set(given) - CHANGED_BY_RESUME)
        fixed += [name for name in ("preset", "out") if getattr(args, name) is not None]
        if fixed:
            raise FastresError(
                f"--{fixed[0].replace('_', '-')} cannot change in a resumed run: leave it out, or start a new run"
            )
        return Plan(saved_config(args.resume).replace(**given), Path(args.resume), True)
    config = preset(preset_of(args), **given)
    check_given([config], given)
    if note := rate_note(preset_of(args), config, given):
        print(note, flush=True)
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
    return Plan(saved.replace(**{name: getattr(config, name) for name in PLACE}), path, True)


def train_with(ranks: Ranks, args: argparse.Namespace) -> int:
    """Train as one of the ranks; only the first one prints and writes."""
    asked = ranks.of_first(lambda: plan(args, ranks))
    config = asked.config
    device = machine.pick_device(rank_device(config.device, ranks))
    accepted_options(config.model)  # an unknown model should not wait for the data
    machine.treat_freed_memory(device, config.keep)
    folder = asked.folder() if ranks.first else None
    path = ranks.of_first(lambda: folder.path if folder else asked.path)
    at = folder or Onlooker(path)
    try:
        with ranks.going_on(path):
            trainer = Trainer(config, load_data(config, ranks), at, ranks=ranks)
            if ranks.of_first(at.begun):
                trainer.resume()
            elif asked.begun:
                say(ranks, f"{path} was stopped before its first checkpoint: starting again")
            if ranks.first:
                describe(trainer)
            history = trainer.fit()
            tested = final_test(trainer)
    finally:
        at.close()
    best = max(history, key=report.rank)
    say(
        ranks,
        f"validation accuracy {history[-1]['val_accuracy']:.2%} on {trainer.dataset.label}, "
        f"best {best['val_accuracy']:.2%} in epoch {best['epoch']}; {history[-1]['seconds']:.1f} s; {path}",
    )
    for line in tested:
        say(ranks, line)
    return 0


def describe(trainer: Trainer) -> None:
    """Print what is about to run and save it beside the options."""
    config, dataset, facts = trainer.config, trainer.dataset, run_facts(trainer)
    trainer.folder.write_config(config, {**facts, "launch": trainer.ranks.launch.facts()})
    print(
        f"{config.model}, {facts['parameters']:,} parameters | {dataset.label}, {len(dataset.train)} + "
        f"{len(dataset.validation)} images{f', {len(dataset.test)} for the test' if dataset.val is not None else ''}, "
        f"{trainer.image_size}x{trainer.image_size} | {facts['device']}, {facts['dtype']}, {facts['backend']}"
        f"{f', {trainer.ranks.count} ranks' if trainer.ranks.count > 1 else ''} | "
        f"{trainer.total_steps} steps | {trainer.folder.path}",
        flush=True,
    )


def sweep(args: argparse.Namespace) -> int:
    """Train a recipe with several seeds and options, and print means and standard errors."""
    given = given_options(args)
    base = preset(preset_of(args), **given)
    if note := rate_note(preset_of(args), base, given):
        print(note, flush=True)
    variants = sweeps.grid(sweeps.parse_setting(text) for text in args.set)
    if any("batch_size" in changes and "lr" not in changes for changes in variants.values()):
        print(f"the learning rate stays at {base.lr:g} for every batch size of --set", flush=True)
    for changes in variants.values():
        check_given([base.replace(**changes)], changes)
    check_given([base.replace(**changes) for changes in variants.values()], given_options(args))
    machine.treat_freed_memory(machine.pick_device(base.device), base.keep)
    now = time.strftime("%Y%m%d-%H%M%S")
    folder = Path(args.out) if args.out else sweeps.new_folder(Path(f"sweeps/{args.preset or 'fast'}-{now}"))
    outcomes = sweeps.sweep(
        base,
        variants,
        range(base.seed, base.seed + args.seeds),
        folder,
        DataCache(),
        lambda line: print(line, flush=True),
    )
    print(f"\n{(folder / 'summary.md').read_text('utf-8', 'surrogateescape')}\n{folder}")
    return int(any(outcome.failure is not None for outcome in outcomes))


class DataCache:
    """Loads the data of a configuration, the last one but once."""

    def __init__(self):
        self._key: tuple | None = None
        self._dataset: data.Dataset | None = None

    def __call__(self, config: TrainConfig) -> data.Dataset:
        key = tuple(getattr(config, name) for name in DATA_OPTIONS)
        if self._dataset is None or key != self._key:
            self._key, self._dataset = key, load_data(config)
        return self._dataset


def eval_(args: argparse.Namespace) -> int:
    """Print loss and accuracy of a trained network on a test set."""
    given = given_options(args)
    device = machine.pick_device(given.get("device", "auto"))
    machine.use_device(device)
    trained = load_trained(find_checkpoint(args.checkpoint), device)
    saved = TrainConfig.from_dict(trained.options)
    config = saved.replace(**given)
    split, label = data.load_test(
        config.data,
        config.data_root,
        trained.classes,
        trained.image_size,
        trained.stored_size,
        say=partial(say, ALONE),
        val_share=config.val_share if same_data(config.data, saved.data) else given.get("val_share"),
        val_seed=config.val_seed,
        skip_bad=config.skip_bad,
    )
    split, label = data.limit_split(split, config.limit_test, "test", label)
    dtype = machine.pick_dtype(config.precision, device)
    batches = data.Batches(
        split,
        min(config.eval_batch_size, len(split)),
        mean=trained.mean,
        std=trained.std,
        augment=data.Augment(resize=trained.image_size),
        train=False,
        device=device,
    )
    start = time.perf_counter()
    scores = evaluate(trained.model, batches, dtype, config.tta)
    if args.report is not None:
        found = confusion(trained.model, batches, len(trained.classes), dtype)
        write_confusion(args.report, found, trained.classes, f"{label}, {trained.path}")
        print(f"{args.report}: by class, {found.line(trained.classes)}")
    averaged = "" if scores.tta_accuracy is None else f", with mirror images {scores.tta_accuracy:.2%}"
    rate = len(split) / (time.perf_counter() - start)
    print(
        f"loss {scores.loss:.4f}  accuracy {scores.accuracy:.2%}{averaged}  on {label}, "
        f"{len(split)} test images  "
        f"({rate:.0f} images/s, {trained.path}, epoch {trained.epoch}{', weight average' if trained.averaged else ''})"
    )
    return 0


def same_data(one: str, other: str) -> bool:
    """Whether two values of --data mean the same: then what was kept for validation must not be trained on."""
    return one == other or (Path(one).exists() and Path(other).exists() and Path(one).samefile(other))


def models(args: argparse.Namespace) -> int:
    """List the networks."""
    for name, parameters, summary in describe_models():
        print(f"{name:<18}{parameters / 1e6:>8.2f} M  {summary}")
    return 0


def bench(args: argparse.Namespace) -> int:
    """Time a training step of a network: eager, compiled, fused."""
    if args.json is not None:
        check_writable("--json", args.json)
    return measure_command.bench(args)


def export(args: argparse.Namespace) -> int:
    """Write a trained network for other programs."""
    check_writable("--out", args.out)
    return export_command.export(args)


def check_writable(option: str, path: Path) -> None:
    """Refuse a file that cannot be written, before the work whose result it is for.

    Raises:
        FastresError: names it.
    """
    folder = path.parent
    reason = None if folder.is_dir() else "No such file or directory"
    if path.is_dir():
        reason = "Is a directory"
    elif reason is None and not os.access(path if path.exists() else folder, os.W_OK):
        reason = "Permission denied"
    if reason is not None:
        raise FastresError(f"cannot write {path}: {reason}; choose another {option}")


def cache(args: argparse.Namespace) -> int:
    """Show or clear what fastres keeps on this machine: decoded images, compiled passes, timed choices."""
    folders = list(dict.fromkeys((cache_folder(), private_folder())))
    entries = [entry for folder in folders for entry in kept(folder)]
    for path, meaning, size in entries:
        print(f"{size / 2**20:>10.1f} MiB  {meaning:<17}  {path}")
    for folder in folders:
        if args.clear:
            print(f"removed {clear(folder)} files from {folder}")
        else:
            print(f"{sum(size for path, _, size in entries if path.parent == folder) / 2**20:>10.1f} MiB  {folder}")
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = Parser(prog="fastres", description="Fast residual networks on PyTorch.")
    parser.add_argument("--version", action="version", version=f"fastres {fastres.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command", parser_class=Parser)

    def command(name: str, run: Callable[[argparse.Namespace], int], **kwargs: Any) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=run.__doc__, description=run.__doc__, **kwargs)
        sub.set_defaults(run=run)
        return sub

    sub = command("train", train)
    sub.add_argument("--preset", help=f"recipe that the options start from: {', '.join(PRESETS)} [fast]")
    sub.add_argument("--out", metavar="FOLDER", help="new run folder [runs/MODEL-TIME]")
    sub.add_argument("--resume", metavar="FOLDER", help="go on with the run in this folder")
    add_options(sub, OPTIONS)

    sub = command("sweep", sweep)
    sub.add_argument("--preset", help=f"recipe that the options start from: {', '.join(PRESETS)} [fast]")
    sub.add_argument("--seeds", type=positive, default=5, metavar="INT", help="seeds a setting, from --seed on [5]")
    sub.add_argument(
        "--set", action="append", default=[], metavar="OPTION=VALUE,VALUE",
        help="values to try, in all combinations where given again; parted by ; where they have commas",
    )  # fmt: skip
    sub.add_argument("--out", metavar="FOLDER", help="folder of all runs; the same one goes on [sweeps/PRESET-TIME]")
    add_options(sub, OPTIONS)

    sub = command("eval", eval_)
    sub.add_argument("--report", type=Path, metavar="FOLDER", help="write accuracy by class and confusion matrix there")
    sub.add_argument("checkpoint", nargs="?", metavar="RUN", help="run folder or checkpoint [newest under runs/]")
    add_options(sub, ("data", "data_root", "val_share", "val_seed", "skip_bad", "limit_test", "eval_batch_size", "tta"))
    add_options(sub, ("device", "precision"))

    sub = command("predict", predict_command.predict)
    predict_command.add_arguments(sub, positive)
    add_options(sub, ("skip_bad", "tta", "device"))

    export_command.add_arguments(command("export", export))

    command("models", models)

    measure_command.add_arguments(command("bench", bench), positive)

    sub = command("cache", cache)
    sub.add_argument("--clear", action="store_true", help="remove it all; it is made again where it is needed")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for a user's error, 128 + N after signal N."""
    with lasting_output() as (out, _):
        try:
            args = make_parser().parse_args(argv)
            out.goes_on = args.run in (train, sweep)  # a run outlasts who watches it
            with terminate_orderly():
                return args.run(args)
        except FastresError as error:
            return complain(f"error: {error}", 2)
        except BrokenPipeError:
            return 128 + signal.SIGPIPE
        except Interrupted as stop:
            return complain(str(stop), 128 + stop.signum)
        except KeyboardInterrupt:
            return complain("stopped before anything was to be saved", 130)
        except (RuntimeError, MemoryError) as error:
            if (remedy := remedy_of(error, training=out.goes_on)) is None:
                raise
            reason = (str(error).strip() or "out of memory").splitlines()[0].split(". ")[0]
            return complain(f"error: {reason}: {remedy}", 2)


def complain(line: str, status: int) -> int:
    """Say one line on standard error; returns the status."""
    print(f"fastres: {' '.join(line.splitlines())}", file=sys.stderr)
    return status


def remedy_of(error: RuntimeError | MemoryError, training: bool) -> str | None:
    """What to do where the machine had too little of something; None: it had not."""
    if is_out_of_memory(error):
        return "lower --batch-size, raise --accumulate or set --checkpoint-every" if training else "give it more memory"
    if "can't start new thread" in str(error):
        return "let this user have more processes (ulimit -u), or set OMP_NUM_THREADS=1"
    return None


if __name__ == "__main__":
    sys.exit(main())
