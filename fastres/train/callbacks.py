"""The hook of a run: a function that hears of every epoch, through which anything can log."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastres.data.dataset import first_line
from fastres.errors import FastresError

if TYPE_CHECKING:
    from fastres.train.trainer import Trainer

# Called on the first rank after each epoch, when its checkpoint is saved and its row written: with the trainer
# (``config``, ``model``, ``folder.path``, ``history``, ``run``, which is the same when a run goes on) and the epoch's
# row of ``metrics.jsonl``. What it raises is said, and the run goes on.
Callback = Callable[["Trainer", dict[str, Any]], object]


def load_callback(text: str) -> Callback:
    """The function of ``FILE.py:NAME`` or ``package.module:NAME``.

    Raises:
        FastresError: where there is none.
    """
    place, colon, name = text.rpartition(":")
    if not colon or not place or not name:
        raise FastresError(f"--callback {text!r} must be FILE.py:FUNCTION or package.module:FUNCTION")
    try:
        module = _file_module(Path(place)) if place.endswith(".py") else _named_module(place)
        found = getattr(module, name)
    except FastresError:
        raise
    except Exception as error:  # what a module does at its import can raise anything
        raise FastresError(f"--callback {text!r} cannot be loaded ({first_line(error)}): correct it") from error
    if not callable(found):
        raise FastresError(f"--callback {text!r} is no function: name one that takes the trainer and a row")
    return found


def _file_module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FastresError(f"--callback: no file {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _named_module(name: str) -> Any:
    if (here := os.getcwd()) not in sys.path:  # as `python -m` has it
        sys.path.append(here)
    return importlib.import_module(name)


def call_all(callbacks: Iterable[Callback], trainer: Trainer, row: dict[str, Any]) -> None:
    """Call them; one that fails ends no run."""
    for callback in callbacks:
        try:
            callback(trainer, dict(row))
        except Exception as error:
            name = getattr(callback, "__name__", type(callback).__name__)
            trainer.say(f"warning: callback {name} failed in epoch {row['epoch']} ({first_line(error)}): going on")
