"""Ranks that end in every phase of a job, and one that has other data."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from fastres.data.dataset import Dataset
from fastres.train import Trainer
from fastres.train.distributed import Onlooker, Ranks, joined
from fastres.train.run_folder import RunFolder

RANKS, LOST = 3, (1, 2)
PHASES = ("after meeting", "before the first step", "in an epoch", "in the validation", "at the checkpoint")


def free_port() -> int:
    """A TCP port that nobody has."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def rank(
    number: int,
    port: int,
    folder: Path,
    make: Callable[[RunFolder | Onlooker, Ranks], Trainer],
    phase: str | None,
) -> None:
    """Train as one rank of `RANKS`; those that are `LOST` end by SIGKILL in a phase."""
    os.environ.update(
        RANK=str(number), WORLD_SIZE=str(RANKS), LOCAL_RANK=str(number), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    lost = phase if number in LOST else None
    with joined() as ranks:
        _die(lost == "after meeting")
        at = RunFolder(folder, resume=True) if ranks.first else Onlooker(folder)
        try:
            with ranks.going_on(folder):
                trainer = make(at, ranks)
                if ranks.of_first(at.begun):
                    trainer.resume()
                _die(lost == "before the first step")
                _arm(trainer, lost)
                trainer.fit()
        finally:
            at.close()


def _die(now: bool) -> None:
    if now:
        os.kill(os.getpid(), signal.SIGKILL)


def _arm(trainer: Trainer, phase: str | None) -> None:
    """Let the trainer end in its second epoch."""
    names = {"in an epoch": "train_step", "in the validation": "_share_statistics", "at the checkpoint": "save"}
    name = names.get(phase or "")
    if name is None:
        return
    call = getattr(trainer, name)

    def deadly(*args: object) -> None:
        _die(trainer.step > 3)
        call(*args)

    mock.patch.object(trainer, name, deadly).start()


def spoilt(dataset: Dataset) -> Dataset:
    """The dataset with one other label."""
    labels = dataset.train.labels.clone()
    labels[0] = (labels[0] + 1) % len(dataset.classes)
    return Dataset(**{**vars(dataset), "train": dataset.train.labelled(labels), "digest": ""})
