"""The folder that a run leaves: options, metrics, TensorBoard events, curves, last and best checkpoint."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from fastres.atomic import atomic_write
from fastres.errors import FastresError
from fastres.train.config import TrainConfig
from fastres.train.curves import plot_curves


class RunFolder:
    """One run's folder, held by one process at a time; one that was made and stays empty is removed by `close`.

    Files: ``config.json``, ``metrics.jsonl`` (a row an epoch), ``curves.png``, ``events.out.tfevents.*``,
    ``last.pt`` (everything a resumed run needs) and ``best.pt`` (the weights with the best validation accuracy).

    Raises:
        FastresError: when the folder cannot be written, is in use, or already holds a run that is not resumed; from
            the writing methods, when the disk takes no more.
    """

    def __init__(self, path: str | os.PathLike, resume: bool = False):
        self.path = Path(path)
        self.last, self.best = self.path / "last.pt", self.path / "best.pt"
        self._lock_file = self.path / ".lock"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self._lock_file, "w")
        except OSError as error:
            raise FastresError(
                f"cannot write to run folder {self.path}: {error.strerror}; choose another with --out"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise FastresError(f"run folder {self.path} is in use by another run: choose another --out") from None
        if self.last.exists() and not resume:
            raise FastresError(
                f"run folder {self.path} already holds a run: go on with `--resume {self.path}` or choose another --out"
            )
        for left in self.path.glob(".*.tmp"):  # of a process that was killed while it wrote
            left.unlink()
        self._tensorboard: Any = None  # a SummaryWriter

    def write_config(self, config: TrainConfig, facts: dict[str, Any]) -> None:
        """Save the options and the facts of the run (data label, device, versions)."""
        options = config.to_dict()
        content = {"options": options, "checksum": _checksum(options), **facts}
        self._write("config.json", json.dumps(content, indent=2) + "\n")

    def write_metrics(self, history: list[dict[str, Any]]) -> None:
        """Save all rows; they are written whole so that a resumed run never holds a row twice."""
        self._write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in history))

    def write_events(self, row: dict[str, Any]) -> None:
        """Add one epoch's row to the TensorBoard events."""
        with self._disk("TensorBoard events"):
            if self._tensorboard is None:
                # a slow import, needed only after the first epoch
                from torch.utils.tensorboard import SummaryWriter

                self._tensorboard = SummaryWriter(self.path, purge_step=row["step"])
            for name, value in row.items():
                if name not in ("step", "epoch") and value is not None:
                    self._tensorboard.add_scalar(name, value, row["step"])
            self._tensorboard.flush()

    def write_curves(self, history: list[dict[str, Any]], label: str) -> None:
        """Draw the learning curves."""
        if history:
            with self._written("curves.png") as file:
                plot_curves(history, label, file)

    def close(self) -> None:
        """Release the folder."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if os.listdir(self.path) == [self._lock_file.name]:
            self._lock_file.unlink()
            self.path.rmdir()
        self._lock.close()

    def _write(self, name: str, text: str) -> None:
        with self._written(name) as file:
            file.write(text.encode())

    @contextmanager
    def _written(self, name: str) -> Iterator[BinaryIO]:
        with self._disk(name), atomic_write(self.path / name) as file:
            yield file

    @contextmanager
    def _disk(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise FastresError(
                f"cannot write {name} in {self.path}: {error.strerror or error}; free space or choose another --out"
            ) from error


def saved_config(path: str | os.PathLike) -> TrainConfig:
    """The options of the run in a folder.

    Raises:
        FastresError: when the folder holds no run or its ``config.json`` is damaged.
    """
    file = Path(path) / "config.json"
    try:
        content = json.loads(file.read_text())
        options = content["options"]
        if content["checksum"] != _checksum(options):
            raise ValueError("its options are not those that were written")
        return TrainConfig.from_dict(options)
    except FileNotFoundError:
        raise FastresError(f"no run in {path}: {file} is missing") from None
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise FastresError(f"{file} is damaged ({error}): restore it or start a new run") from error


def saved_job(path: str | os.PathLike) -> str | None:
    """The id of the ``torchrun`` job that began the run in a folder; None: there is no such id or no run."""
    try:
        job = json.loads((Path(path) / "config.json").read_text())["job"]
    except (OSError, KeyError, TypeError, ValueError, RecursionError):
        return None
    return job if isinstance(job, str) else None


def _checksum(options: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()
