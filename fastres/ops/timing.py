"""A timed choice among implementations, made once per operation, shape and machine, and remembered on disk."""

from __future__ import annotations

import json
import math
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
    measurements, never the file. What in it is no choice is left out with a warning and measured again, by this machine or
    by the one it belongs to.

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
            "winner": min(times, key=times.__getitem__),
            "milliseconds": times,
            "errors": {name: f"{type(error).__name__}: {error}"[:200] for name, error in errors.items()},
        }

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self._path.read_text())
        except FileNotFoundError:
            return {}
        except OSError as error:
            _warn(f"{self._path} cannot be read ({error}): the choices are timed again; allow it, or set FASTRES_CACHE")
            return {}
        except (ValueError, RecursionError) as error:
            sound: dict[str, Any] = {}
            wrong = [str(error)]
        else:
            sound, wrong = _sound(content)
        if wrong:
            found = wrong[0] if len(wrong) == 1 else f"{wrong[0]} and {len(wrong) - 1} more"
            _warn(
                f"{self._path} is damaged ({found}): what is missing is timed again and the file written anew; "
                "delete it if this comes back"
            )
        return sound

    def _write(self, key: str, entry: dict[str, Any]) -> None:
        content = self._read()
        content.setdefault(self._machine, {})[key] = entry
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self._path) as file:
                file.write(json.dumps(content, indent=1, sort_keys=True).encode())
        except OSError as error:
            _warn(f"{self._path} cannot be written ({error}): the choice holds for this process")


def _sound(content: Any) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """What are choices, by machine and key, in the content of a file, and for each other thing a word on it."""
    if not isinstance(content, dict):
        return {}, [f"a {type(content).__name__}, not an object"]
    sound: dict[str, dict[str, Any]] = {}
    wrong = []
    for machine, entries in content.items():
        if not isinstance(entries, dict):
            wrong.append(f"no choices under {machine[:60]!r}")
            continue
        sound[machine] = {key: entry for key, entry in entries.items() if _is_choice(entry)}
        wrong += [f"no choice under {key[:60]!r}" for key in entries if key not in sound[machine]]
    return sound, wrong


def _is_choice(entry: Any) -> bool:
    """Whether an entry is one that `TimedChoices` writes: the winner is the fastest of those with times."""
    if not isinstance(entry, dict):
        return False
    winner, times = entry.get("winner"), entry.get("milliseconds")
    if not (isinstance(times, dict) and isinstance(winner, str) and winner in times):
        return False
    numbers = all(type(time) in (int, float) and 0 <= time < math.inf for time in times.values())
    return numbers and times[winner] == min(times.values())


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)
