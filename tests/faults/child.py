"""Small runs in processes of their own, and how they ended.

Runs are of a small network on drawn images. Each process is forked from one that has only imported modules: after a
backward, autograd refuses to run in a fork.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.utils.tensorboard  # noqa: F401  slow to import, so not in every forked process

from fastres.data.dataset import make_dataset
from fastres.data.synthetic import CLASSES, synthetic_split
from fastres.errors import FastresError
from fastres.train import TrainConfig, Trainer
from fastres.train.checkpoint import load_checkpoint
from fastres.train.distributed import ALONE, Onlooker, Ranks
from fastres.train.facts import run_facts
from fastres.train.run_folder import RunFolder, saved_config
from faults import damage, lost_ranks

EPOCHS = 6
PATIENCE = 300  # seconds after which a process that hangs is ended, which counts as wrong
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["faults.runs"])
OUTCOMES = ("refused", "harmless", "wrong")


def make_trainer(run: RunFolder | Onlooker, ranks: Ranks = ALONE, epochs: int = EPOCHS, other: bool = False) -> Trainer:
    """ResNet-20 on 48 drawn images of 8x8; ``other``: with one other label."""
    config = TrainConfig().replace(
        model="resnet20", image_size=8, epochs=epochs, batch_size=15, device="cpu", precision="fp32", backend="eager"
    )
    split = synthetic_split(48)
    dataset = make_dataset(split, split, CLASSES, "drawn shapes")
    return Trainer(config, lost_ranks.spoilt(dataset) if other else dataset, run, say=lambda line: None, ranks=ranks)


def fit(folder: Path, resume: bool = True, epochs: int = EPOCHS, other: bool = False) -> None:
    """Train to the end, going on where the folder's run stopped."""
    run = RunFolder(folder, resume=resume)
    try:
        trainer = make_trainer(run, epochs=epochs, other=other)
        if run.begun():
            trainer.resume()
        if (folder / "config.json").exists():
            saved_config(folder)  # as the command line does
        run.write_config(trainer.config, run_facts(trainer))
        trainer.fit()
    finally:
        run.close()


class Child:
    """A process that does some work; an error of the user's ends it with 2 and one line, as the command line's.

    It is forked from one that has only imported modules: after a backward, autograd refuses to run in a fork.

    Args:
        work: a function of a module, or a `partial` of one.
    """

    def __init__(self, work: Callable[[], Any]):
        self._output, there = _PROCESSES.Pipe(duplex=False)
        self.process = _PROCESSES.Process(target=_do, args=(work, there))
        self.process.start()
        there.close()

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()

    def end(self) -> tuple[int | None, str]:
        """Its exit status, negative for the signal that ended it, and what it printed."""
        text = ""
        with contextlib.suppress(EOFError):
            text = self._output.recv()
        self.process.join()
        return self.process.exitcode, text

    def outcome(self, *words: str) -> str:
        """``harmless`` where it ended well, ``refused`` where it complained in one line that has the words."""
        status, text = self.end()
        if status == 0:
            return "harmless"
        if status == 2 and text.count("\n") == 1 and all(word in text for word in words):
            return "refused"
        return f"wrong: status {status}: {text.strip()[-400:]}"


def _do(work: Callable[[], Any], output: Connection) -> None:
    signal.alarm(PATIENCE)
    torch.set_num_threads(1)
    status, text = 1, io.StringIO()  # not a file: its size may be limited
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            work()
            status = 0
        except FastresError as error:
            print(f"fastres: error: {error}")
            status = 2
        except Exception:
            traceback.print_exc()
    output.send(text.getvalue())
    os._exit(status)


def whole_files(run: Path) -> str:
    """Whether every file that a run left can be read."""
    try:
        for name in ("last.pt", "best.pt"):
            if (run / name).exists():
                load_checkpoint(run / name)
        if (run / "config.json").exists():
            saved_config(run)
        if (run / "metrics.jsonl").exists():
            assert (run / "metrics.jsonl").read_text().endswith("}\n"), "metrics.jsonl ends in half a row"
    except Exception as error:
        return f"wrong: {type(error).__name__}: {error}"
    return "harmless"


def same_run(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two checkpoints have the same weights, optimizer state and accuracies, bit for bit."""

    def facts(content: dict[str, Any]) -> list[Any]:
        rows = [(row["epoch"], row["train_loss"], row["val_accuracy"]) for row in content["history"]]
        return [content["weights"], content["optimizer"]["state"], rows]

    return damage.same(facts(one), facts(other))


def stopped_run(folder: Path) -> Path:
    """The folder of a run that was killed behind its first epoch."""
    child = Child(partial(fit, folder))
    while not (folder / "metrics.jsonl").exists():
        if not child.process.is_alive():
            raise RuntimeError(f"a run ended before its first epoch: {child.end()}")
        time.sleep(0.005)
    child.kill()
    child.end()
    return folder


def table_row(fault: str, outcomes: list[str]) -> dict[str, Any]:
    """How often each outcome was, and why it was wrong."""
    kinds = [outcome.split(":")[0] for outcome in outcomes]
    reasons = sorted({outcome for outcome in outcomes if outcome.startswith("wrong")})
    counts = {kind: kinds.count(kind) for kind in OUTCOMES}
    return {"fault": fault, "tried": len(outcomes), **counts, "reasons": reasons[:20]}
