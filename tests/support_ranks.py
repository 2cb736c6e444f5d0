"""A process of the tests of training with several ranks; a module of its own, as spawned processes import it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import support_process
from support_train import tiny_config, tiny_dataset

from fastres.train import Trainer
from fastres.train.distributed import Onlooker, joined
from fastres.train.run_folder import RunFolder


def train(rank: int, ranks: int, port: int, folder: Path, stop_at: int | None, changes: dict[str, Any]) -> None:
    """Train or go on in ``folder``; ``stop_at``: save and end after that many steps of an epoch."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    support_process.begin()
    with joined() as together:
        at = RunFolder(folder, resume=True) if together.first else Onlooker(folder)
        trainer = Trainer(tiny_config(**changes), tiny_dataset(), at, say=lambda line: None, ranks=together)
        if together.of_first(at.begun):
            trainer.resume()
        if stop_at is None:
            trainer.fit()
        else:
            for images, labels in trainer.train_batches.epoch(0):
                trainer.train_step(images, labels)
                if trainer.step == stop_at:
                    break
            trainer.save()
        at.close()
