"""A timed choice among implementations, made once per operation, shape and machine, and remembered on disk."""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

import torch

from fastres.atomic import atomic_write
from fastres.cache import cache_folder
from fastres.kernels.configs import taken
from fastres.ops.agreement import coarsest, difference
from fastres.ops.graphs import is_one_graph

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
    """Winners by key, measured when first asked for: by the GPU's time, and where it is no CUDA graph the host's.

    A candidate that takes the very tiles of an earlier one is left out. One that fails (no kernel for a shape, say)
    loses and its error is kept beside the times; when all fail, the first one's error is raised. One whose result is
    not that of the first (`fastres.ops.agreement`) loses with a warning; how far each is from it is kept too. A choice
    in which a candidate ran out of memory holds for this process only, as the next may have more. An error after which
    the device computes no more (an illegal address, say) is raised, as nothing can be timed behind it.

    Processes share the file: each writes what it read together with what it measured, and of two that write at once one
    loses some measurements, never the file. What in it is no choice is left out with a warning and measured again, by
    this machine or by the one it belongs to.

    Args:
        path: the JSON file, made with its folder when first written.
        machine: first key of the file, see `machine_key`.
        timer: milliseconds of a call.
        host: what a call costs the host in milliseconds; None: nothing.
    """

    def __init__(self, path: Path, machine: str, timer: Timer = gpu_milliseconds, host: Timer | None = None):
        self._path, self._machine, self._timer, self._host = path, machine, timer, host
        known = self._read().get(machine, {})
        # an earlier version kept those that ran out of memory as losers
        self._known = {key: entry for key, entry in known.items() if not any(map(_tells_of_memory, _errors(entry)))}

    def known(self, key: str, candidates: Container[str]) -> str | None:
        """Name of the fastest, if it was measured before and is among the candidates."""
        winner = _fastest(self._known[key]) if key in self._known else None
        return winner if winner in candidates else None

    def choose(self, key: str, candidates: Mapping[str, Callable[[], Any]]) -> str:
        """Name of the fastest of ``candidates``, calls by name."""
        if self.known(key, candidates) is None:
            self._known[key] = entry = self._measure(key, candidates)
            short = [name for name, text in entry["errors"].items() if _tells_of_memory(text)]
            if not short:
                self._write(key, entry)
            else:
                _warn(
                    f"{', '.join(short)} ran out of memory in the timing of {key}: this process takes "
                    f"{_fastest(entry)}, the next one times again"
                )
        return _fastest(self._known[key])

    def _measure(self, key: str, candidates: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
        times: dict[str, float] = {}
        host: dict[str, float] = {}
        differences: dict[str, float] = {}
        errors: dict[str, Exception] = {}
        seen: list[Any] = []
        first: tuple[str, Any] | None = None
        for name, call in candidates.items():
            try:
                with taken() as tiles:
                    result = call()
                if tiles and tiles in seen:
                    continue
                seen.append(tiles)
                if first is None:
                    first = name, result
                else:
                    dtype = coarsest([first[1], result, getattr(call, "args", ())])
                    differences[name], fault = difference(first[1], result, dtype)
                    if fault is not None:
                        raise DifferentResult(f"{fault}, compared with {first[0]!r}")
                result = None
                if self._host is not None:
                    host[name] = self._host(call)
                times[name] = self._timer(call)
            except Exception as error:
                errors[name] = error.with_traceback(None)  # which would keep tensors alive
                if _lost_device(error):
                    _warn(f"{name!r} of {key}, or a kernel before it, broke the CUDA device: {error}")
                    raise
                if isinstance(error, DifferentResult):
                    _warn(
                        f"WRONG RESULT: {name!r} of {key}: its {error}. It is not used. One of the two is wrong: "
                        "please report this with the versions of PyTorch, Triton and the driver"
                    )
        if not times:
            raise next(iter(errors.values()))
        return {
            "winner": min(times, key=times.__getitem__),
            "milliseconds": times,
            "host": {name: host[name] for name in times if name in host},
            "differences": {name: min(size, sys.float_info.max) for name, size in differences.items()},
            "errors": {name: f"{type(error).__name__}: {error}"[:300] for name, error in errors.items()},
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
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with atomic_write(self._path) as file:
                file.write(json.dumps(content, indent=1, sort_keys=True).encode())
        except OSError as error:
            _warn(f"{self._path} cannot be written ({error}): the choice holds for this process")


class DifferentResult(Exception):
    """A candidate did not compute what the first one did."""


def _fastest(entry: dict[str, Any]) -> str:
    """The candidate of the least time: of the GPU's in a graph, else of that and the host's."""
    if is_one_graph():
        return entry["winner"]
    times, host = entry["milliseconds"], entry.get("host", {})
    return min(times, key=lambda name: times[name] + host.get(name, 0.0))


def _errors(entry: dict[str, Any]) -> list[str]:
    """The texts of a choice's errors; none where they are damaged, as nothing but this depends on them."""
    errors = entry.get("errors")
    return [str(text) for text in errors.values()] if isinstance(errors, dict) else []


def _tells_of_memory(text: str) -> bool:
    """Whether an error is that of too little device memory: PyTorch's, CUDA's or Triton's own, or a library's."""
    text = text.lower()
    words = "outofmemoryerror", "out of memory", "cudaerrormemoryallocation", "alloc_failed", "allocation_failed"
    return any(word in text for word in words)


# What CUDA says of errors that end a process's use of the device (CUDA Runtime API, cudaError).
_STICKY = (
    "illegal memory access",
    "illegal address",
    "misaligned address",
    "illegal instruction",
    "invalid program counter",
    "invalid address space",
    "global/shared address space",
    "hardware stack error",
    "device-side assert",
    "unspecified launch failure",
    "launch timed out",
    "uncorrectable",
)


def _lost_device(error: Exception) -> bool:
    """Whether the device computes no more in this process: by the error's words, or because it does not answer."""
    if any(words in str(error) for words in _STICKY):
        return True
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
    return False


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
    """Whether an entry is one that `TimedChoices` writes: the winner is the one of the least GPU time."""
    if not isinstance(entry, dict):
        return False
    winner, times = entry.get("winner"), entry.get("milliseconds")
    if not (isinstance(times, dict) and isinstance(winner, str) and winner in times):
        return False
    host = entry.get("host", {})  # an earlier version kept none
    if not isinstance(host, dict):
        return False
    numbers = all(type(time) in (int, float) and 0 <= time < math.inf for time in (*times.values(), *host.values()))
    return numbers and times[winner] == min(times.values())


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)
