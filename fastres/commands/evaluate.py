"""``fastres eval``: loss and accuracy of a trained network."""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

from fastres import data
from fastres.commands.options import given_options, say
from fastres.data.budget import memory_budget
from fastres.train import TrainConfig, machine
from fastres.train.confusion import confusion, write_confusion
from fastres.train.distributed import ALONE
from fastres.train.evaluate import evaluate
from fastres.train.trained import find_checkpoint, load_trained
from fastres.train.useless import check_given


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
        budget=memory_budget(given.get("memory_budget"), device),
        center_share=trained.center_share,
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
        workers=given.get("workers"),
    )
    check_given([config], given.keys() & {"tta_shift"})
    if config.views is not None:
        config.views.check(trained.image_size)
    start = time.perf_counter()
    scores = evaluate(trained.model, batches, dtype, config.views)
    if args.report is not None:
        found = confusion(trained.model, batches, len(trained.classes), dtype)
        write_confusion(args.report, found, trained.classes, f"{label}, {trained.path}")
        print(f"{args.report}: by class, {found.line(trained.classes)}")
    averaged = "" if scores.tta_accuracy is None else f", over {config.views} {scores.tta_accuracy:.2%}"
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
