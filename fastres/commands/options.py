"""What several commands do with the options that they were given."""

from __future__ import annotations

import argparse
import dataclasses
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastres import data
from fastres.data.budget import memory_budget
from fastres.errors import FastresError
from fastres.train import machine
from fastres.train.config import TrainConfig
from fastres.train.config_file import OptionsFile, read_options
from fastres.train.distributed import ALONE, Ranks, rank_device
from fastres.train.presets import preset, rate_note
from fastres.train.pretrained import read_weights

OPTIONS = {f.name: f for f in dataclasses.fields(TrainConfig)}
DATA_OPTIONS = (  # those that `load_data` reads
    "data", "data_root", "image_size", "val_share", "val_seed", "skip_bad", "limit_train", "limit_test",
    "memory_budget", "crop_scale", "center_share", "weights",
)  # fmt: skip


def given_options(args: argparse.Namespace) -> dict:
    """The configuration options that stood on the command line."""
    return {name: value for name, value in vars(args).items() if name in OPTIONS}


@dataclass(frozen=True)
class Recipe:
    """What a command line asks for: a preset's values, a file's over them, and the command line's own over both.

    Attributes:
        preset: its name.
        config: the options.
        given: those that somebody wrote down, on the command line or in a file of their own.
        notes: lines on the learning rate of another batch than the preset's or the file's.
    """

    preset: str
    config: TrainConfig
    given: dict[str, Any]
    notes: list[str]


def recipe(args: argparse.Namespace) -> Recipe:
    """The recipe of `fastres train` or `fastres sweep`.

    Raises:
        FastresError: for a preset, a file or an option that is wrong.
    """
    file = read_options(Path(args.config)) if args.config is not None else OptionsFile({})
    own = given_options(args)
    name = next(n for n in (args.preset, file.preset, "fast") if n is not None)
    options = file.merged(own)
    if options.get("weights") is not None and "model" not in options:  # then they name it, where they can
        options |= {"model": model} if (model := read_weights(options["weights"], preset(name).model).model) else {}
    config = preset(name, **options)
    if file.whole and config.batch_size != file.options.get("batch_size") and "lr" not in own:
        note: str | None = f"the learning rate stays {config.lr:g}, as {args.config} has it; --lr sets another"
    else:
        note = rate_note(name, config, options)
    return Recipe(name, config, own if file.whole else options, [note] if note else [])


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
            budget=memory_budget(config.memory_budget, machine.pick_device(rank_device(config.device, ranks))),
            from_files=config.crop_scale is not None,
            center_share=config.center_share,
            of_photos_alone=config.weights is not None,  # which it may be of, whatever the data
        )
    )
    dataset = data.limit(dataset, config.limit_train, config.limit_test)
    if others := ranks.others_than_first(dataset.digest):
        raise FastresError(
            f"rank {others[0]} has other images or labels than rank 0, here {dataset.label!r}: give all machines the "
            "same data"
        )
    return dataset


def say(ranks: Ranks, line: str) -> None:
    """Print a line once, not once a rank."""
    if ranks.first:
        print(line, flush=True)


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
