"""A timed choice among implementations, made once per operation, shape and machine, and remembered on disk."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fastres.atomic import atomic_write
from fastres.kernels.configs import taken
from fastres.ops.cache import cache_folder

Timer = Callable[[Callable[[], Any]], float]


def gpu_milliseconds(call: Callable[[], Any]) -> float:
    """Median time of ``call`` on the current GPU, the L2 cache emptied between the repetitions."""
    from triton.testing import do_bench

    return do_bench(call, warmup=5, rep=20, return_mode="median")


def machine_key(device: torch.device) -> str:
    """Everything but the shape that a choice depends on: GPU and versions."""
    import triton

    import fastres

    major, minor = torch.cuda.get_device_capability(device)
    return (
        f"{torch.cuda.get_device_name(device)} sm_{major}{minor}, torch {torch.__version__}, "
        f"triton {triton.__version__}, fastres {fastres.__version__}"
    )


def choices_path() -> Path:
    """``choices.json`` in the cache folder."""
    return cache_folder() / "choices.json"


class TimedChoices:
    """Winners by key, measured when first asked for.

    A candidate that takes the very tiles of an earlier one is left out. One that fails (too little shared memory, say)
    loses and its error is kept beside the times; when all fail, the first one's error is raised. Processes share the
    file: each writes what it read together with what it measured, and of two that write at once one loses some
    measurements, never the file.

    Args:
        path: the JSON file, made with its folder when first written.
        machine: first key of the file, see `machine_key`.
        timer: milliseconds of a call.
    """

    def __init__(self, path: Path, machine: str, timer: Timer = gpu_milliseconds):
        self._path, self._machine, self._timer = path, machine, timer
        self._known = self._read().get(machine, {})

    def choose(self, key: str, candidates: Mapping[str, Callable[[], Any]]) -> str:
        """Name of the fastest of ``candidates``, calls by name."""
        entry = self._known.get(key)
        if entry is None or entry["winner"] not in candidates:
            self._known[key] = entry = self._measure(candidates)
            self._write(key, entry)
        return entry["winner"]

    def _measure(self, candidates: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
        times, errors, seen = {}, {}, []
        for name, call in candidates.items():
            try:
                with taken() as tiles:
                    call()
                if not tiles or tiles not in seen:
                    times[name] = self._timer(call)
                seen.append(tiles)
            except Exception as error:
                errors[name] = error
        if not times:
            raise next(iter(errors.values()))
        return {
            "winner": min(times, key=times.get),
            "milliseconds": times,
            "errors": {name: f"{type(error).__name__}: {error}"[:200] for name, error in errors.items()},
        }

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self._path.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            warnings.warn(f"{self._path} cannot be read ({error}): the choices are timed again", stacklevel=3)
            return {}
        return content if isinstance(content, dict) else {}

    def _write(self, key: str, entry: dict[str, Any]) -> None:
        content = self._read()
        content.setdefault(self._machine, {})[key] = entry
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self._path) as file:
                file.write(json.dumps(content, indent=1, sort_keys=True).encode())
        except OSError as error:
            warnings.warn(f"{self._path} cannot be written ({error}): the choice holds for this process", stacklevel=3)
