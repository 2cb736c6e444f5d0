"""The folder that a run leaves: options, metrics, TensorBoard events, curves, last and best checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fastres.atomic import atomic_write, leftovers
from fastres.errors import FastresError
from fastres.train.checkpoint import CheckpointError, DamagedCheckpoint, load_checkpoint, save_checkpoint
from fastres.train.config import TrainConfig
from fastres.train.confusion import FILES as CONFUSION
from fastres.train.content import RUN, check_content
from fastres.train.curves import plot_curves
from fastres.train.events import Events
from fastres.train.identity import check_same_run, checksum
from fastres.train.lock import Lock
from fastres.train.samples import FILE as SAMPLES

LOCK, CONFIG, METRICS, CURVES, RESULT, TEST = (
    ".lock", "config.json", "metrics.jsonl", "curves.png", "result.json", "test.json",
)  # fmt: skip
LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"
_WRITTEN = (CONFIG, METRICS, CURVES, RESULT, TEST, LAST, PREVIOUS, BEST, SAMPLES, *CONFUSION)
_NO_RUN = "no run can go on from it"


class RunFolder:
    """One run's folder, held by one process at a time; one that was made and stays empty is removed by `close`.

    Files: ``config.json``, ``metrics.jsonl`` (a row an epoch), ``curves.png``, ``events.out.tfevents.*``,
    ``last.pt`` (everything a resumed run needs), ``previous.pt`` (the checkpoint before it) and ``best.pt`` (the
    weights with the best validation accuracy). Nothing else in the folder is touched.

    Args:
        resume: whether the folder may hold a run; it is then the beginning of this one.

    Raises:
        FastresError: when the folder cannot be written, is in use, already holds a run that is not resumed, or files
            that are no run's; from the writing methods, when the disk takes no more.
    """

    def __init__(self, path: str | os.PathLike, resume: bool = False):
        self.path = Path(path)
        self.last, self.best, self.previous = self.path / LAST, self.path / BEST, self.path / PREVIOUS
        try:
            self._made = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            self._check_files(resume)  # before the lock makes a file there
            self._lock = Lock(
                self.path / LOCK, f"run folder {self.path} is in use by another run: choose another --out"
            )
        except OSError as error:
            raise FastresError(
                f"cannot write to run folder {self.path}: {error.strerror}; choose another with --out"
            ) from error
        try:
            self._check_files(resume)  # another run may have begun and ended since
        except (FastresError, OSError):
            self._lock.release()
            raise
        for left in leftovers(self.path, _WRITTEN):  # of a process that was killed while it wrote
            with suppress(OSError):
                left.unlink()
        self._events = Events(self.path)

    @classmethod
    def new(cls, path: Path) -> RunFolder:
        """A folder that nobody has yet: ``path``, or with the first number behind it that is free."""
        for number in range(1, 1000):
            numbered = path if number == 1 else path.with_name(f"{path.name}-{number}")
            try:
                numbered.mkdir(parents=True)
            except FileExistsError:
                continue
            except OSError as error:
                raise FastresError(f"cannot write to {path.parent}: {error.strerror}; choose another --out") from error
            folder = cls(numbered)
            folder._made = True
            return folder
        raise FastresError(f"{path} and 998 folders like it are taken: choose another with --out")

    def _check_files(self, resume: bool) -> None:
        names = set(os.listdir(self.path)) - {LOCK} - {left.name for left in leftovers(self.path, _WRITTEN)}
        if not names:
            return
        if names & {LAST, PREVIOUS, BEST} or is_config(self.path / CONFIG):
            if not resume:
                raise FastresError(
                    f"run folder {self.path} already holds a run: go on with `--resume {self.path}` or choose another "
                    "--out"
                )
            return
        raise FastresError(
            f"run folder {self.path} holds {sorted(names)[0]!r}, which is no run's: choose an empty folder with --out"
        )

    def begun(self) -> bool:
        """Whether there is a checkpoint to go on from.

        Raises:
            FastresError: where there is none, but a run that has come further than its first checkpoint.
        """
        if self.last.is_file() or (not os.path.lexists(self.last) and self.previous.is_file()):
            return True
        further = [path for path in (self.best, self.previous, self.path / METRICS) if os.path.lexists(path)]
        if os.path.lexists(self.last) or further:
            what = "leads nowhere" if os.path.lexists(self.last) else f"is missing beside {further[0].name}"
            raise FastresError(f"{self.last} {what}: put it back, or start a new run with another --out")
        return False

    def load(self, device: torch.device | str, say: Callable[[str], None]) -> dict[str, Any]:
        """The last checkpoint, or with a warning the one before it where the last is damaged or gone.

        Raises:
            CheckpointError: when there is none that is whole, or it holds what no run has written.
            FastresError: when it is of another run than ``config.json`` beside it.
        """
        try:
            saved, source = load_checkpoint(self.last, device), self.last
        except DamagedCheckpoint as error:
            if not self.previous.is_file():
                raise
            saved, source = load_checkpoint(self.previous, device), self.previous
            check_content(saved, RUN, source, _NO_RUN)
            say(f"warning: {error}; going on from {source}, the one before it, at step {saved['step']}")
        check_content(saved, RUN, source, _NO_RUN)
        facts = read_config(self.path) if (self.path / CONFIG).exists() else None
        check_same_run(saved, facts, source)
        return saved

    def load_previous(self) -> dict[str, Any] | None:
        """The checkpoint before the last, unchecked; None where there is none that is whole."""
        try:
            return load_checkpoint(self.previous)
        except CheckpointError:
            return None

    def save(self, content: dict[str, Any]) -> None:
        """Write ``last.pt``; the one that was there is kept as ``previous.pt``."""
        if self.last.is_file() and not self.last.is_symlink():
            with self._disk(PREVIOUS):
                self._keep_last()
        save_checkpoint(self.last, content)

    def _keep_last(self) -> None:
        """A second name where the file system can, so that ``last.pt`` is there at every moment; else another name."""
        name = self.path / f".{PREVIOUS}.{os.getpid():08d}.tmp"
        with suppress(FileNotFoundError):
            name.unlink()
        try:
            os.link(self.last, name)
        except OSError:
            os.replace(self.last, self.previous)
            return
        os.replace(name, self.previous)
        with suppress(FileNotFoundError):
            name.unlink()  # of two names of one file, a rename does nothing

    def save_best(self, content: dict[str, Any]) -> None:
        """Write ``best.pt``."""
        save_checkpoint(self.best, content)

    def best_epoch(self, run: str) -> int | None:
        """The epoch of ``best.pt``, None where there is none or it is damaged.

        Raises:
            FastresError: when it is another run's.
        """
        try:
            saved = load_checkpoint(self.best)
        except DamagedCheckpoint:
            return None
        if saved.get("run") != run:
            raise FastresError(f"{self.best} is of another run than last.pt beside it: put back the run's own file")
        return saved["epoch"] if isinstance(saved.get("epoch"), int) else None

    def write_config(self, config: TrainConfig, facts: dict[str, Any]) -> None:
        """Save the options and the facts of the run (its id, digest of the data, label, device, versions)."""
        content = {"options": config.to_dict(), **facts}
        self._events.options = content["options"]
        self._write(CONFIG, json.dumps({"checksum": checksum(content), **content}, indent=2) + "\n")

    def write_metrics(self, history: list[dict[str, Any]]) -> None:
        """Save all rows; they are written whole so that a resumed run never holds a row twice."""
        self._write(METRICS, "".join(json.dumps(row) + "\n" for row in history))

    def write_events(self, row: dict[str, Any]) -> None:
        """Add one epoch's row to the TensorBoard events."""
        with self._disk("TensorBoard events"):
            self._events.write([row])

    def write_file(self, name: str, content: bytes) -> None:
        """Write one more file of the run's, whole or not at all."""
        with self._written(name) as file:
            file.write(content)

    def write_picture(self, tag: str, pixels: Any, step: int) -> None:
        """Add a picture, uint8 [H, W, 3], to the TensorBoard events."""
        with self._disk("TensorBoard events"):
            self._events.write_picture(tag, pixels, step)

    def restore_rows(self, history: list[dict[str, Any]]) -> None:
        """Write the rows that a process could not before it ended: events come before metrics, so those tell which."""
        known: list[Any] = []
        if (self.path / METRICS).is_file():
            with suppress(OSError, ValueError):
                known = [json.loads(line) for line in (self.path / METRICS).read_text().splitlines()]
        if known != history:
            same = next((n for n, (ours, theirs) in enumerate(zip(history, known)) if ours != theirs), len(known))
            with self._disk("TensorBoard events"):
                self._events.write(history[same:])
            self.write_metrics(history)

    def write_curves(self, history: list[dict[str, Any]], label: str) -> None:
        """Draw the learning curves."""
        if history:
            with self._written(CURVES) as file:
                plot_curves(history, label, file)

    def close(self) -> None:
        """Release the folder."""
        self._events.close()
        with suppress(OSError):
            if os.listdir(self.path) == [LOCK]:
                self._lock.path.unlink()
                if self._made:
                    self.path.rmdir()
        self._lock.release()

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


def is_config(file: Path) -> bool:
    """Whether a file is a run's ``config.json``, whole or not; somebody's own of that name has other keys."""
    try:
        text = file.read_text(errors="replace") if file.is_file() else ""
    except OSError:
        return False
    return '"options"' in text and '"checksum"' in text


def read_config(path: str | os.PathLike) -> dict[str, Any]:
    """The content of a run's ``config.json``: its options and facts, see `RunFolder.write_config`.

    Raises:
        FastresError: when the folder holds no run or the file is not as it was written.
    """
    file = Path(path) / CONFIG
    try:
        if not file.is_file():
            raise FileNotFoundError
        content = json.loads(file.read_text())
        if content.pop("checksum") != checksum(content):
            raise ValueError("it is not what was written")
        TrainConfig.from_dict(content["options"])
        return content
    except FileNotFoundError:
        raise FastresError(f"no run in {path}: {file} is missing") from None
    except (OSError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise FastresError(f"{file} is damaged ({error}): restore it or start a new run") from error


def saved_config(path: str | os.PathLike) -> TrainConfig:
    """The options of the run in a folder; raises as `read_config`."""
    return TrainConfig.from_dict(read_config(path)["options"])


def saved_launch(path: str | os.PathLike) -> Any:
    """What the run in a folder remembers of the launch that began it; None: nothing, or there is no whole run."""
    try:
        return read_config(path).get("launch")
    except FastresError:
        return None
