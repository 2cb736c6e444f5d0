"""What checkpoints hold of a trainer, and the way back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastres.data.dataset import first_line
from fastres.errors import FastresError
from fastres.train.checkpoint import CheckpointError, load_weights
from fastres.train.memory import is_out_of_memory
from fastres.train.optimizer_state import load_state

if TYPE_CHECKING:
    from fastres.train.trainer import Trainer


def identity(trainer: Trainer) -> dict[str, Any]:
    """What `fastres eval` and `predict` need beside the weights, and what tells this run from all others."""
    dataset = trainer.dataset
    return {
        "run": trainer.run,
        "digest": dataset.digest,
        "initial": trainer.weights,
        "model": trainer.config.model,
        "model_options": trainer.model_options,
        "options": trainer.config.to_dict(),
        "classes": list(dataset.classes),
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "image_size": trainer.image_size,
        "stored_size": dataset.train.size[-1],
        "center_share": dataset.center_share,
        "data": dataset.label,
        "epoch": trainer.epoch,
        "step": trainer.step,
    }


def progress(trainer: Trainer) -> dict[str, Any]:
    """What a resumed run needs beside its `identity`."""
    tally = trainer.tally.total(trainer.ranks)
    return {
        "weights": trainer.model.state_dict(),
        "average": trainer.average.state_dict() if trainer.average is not None else None,
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "batch": trainer.batch,
        "seconds": trainer.seconds,
        "train_seconds": trainer.train_seconds,
        "epoch_seconds": trainer.epoch_seconds,
        "tally": [tally.loss, tally.correct, tally.images, tally.skipped],
        "history": trainer.history,
    }


def take_up(trainer: Trainer, saved: dict[str, Any], source: Path) -> None:
    """Put a trainer where the saved one was.

    Raises:
        CheckpointError: when the state is another network's or optimizer's.
        FastresError: when the run had other data.
    """
    dataset = trainer.dataset
    if saved["digest"] != dataset.digest:
        other = dataset.label if saved["data"] != dataset.label else "these images or labels, which have changed"
        raise FastresError(
            f"{source} was trained on {saved['data']!r}, not on {other!r}: give the former data with --data"
        )
    if saved["image_size"] != trainer.image_size:
        raise FastresError(
            f"{source} was trained on images of {saved['image_size']} pixels, not {trainer.image_size}: give the "
            "former data with --data"
        )
    load_weights(trainer.model, saved["weights"], source)
    try:
        if trainer.average is not None:
            trainer.average.load_state_dict(saved["average"])
        load_state(trainer.optimizer, saved["optimizer"])
        if trainer.scaler.is_enabled():
            trainer.scaler.load_state_dict(saved["scaler"])
    except Exception as error:  # what is wrong in a nest of values can raise anything
        if is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"checkpoint {source} has another optimizer's state ({first_line(error)}): take another one or train again"
        ) from error
    trainer.run = saved["run"]
    trainer.weights = saved.get("initial")
    trainer.epoch, trainer.step, trainer.batch = saved["epoch"], saved["step"], saved["batch"]
    for name in ("seconds", "train_seconds", "epoch_seconds"):
        setattr(trainer, name, saved[name])
    if trainer.ranks.first:  # the sums of all
        trainer.tally.restore(*saved["tally"])
    trainer.history = saved["history"]
