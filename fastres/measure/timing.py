"""Times of calls that are to be compared: taken in turn, after a warm-up, reported as median and quartiles."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from fastres.train.machine import on_device

SAMPLE_SECONDS = 0.05  # a sample on a GPU is as many calls as take so long: launches then overlap as in training


class Timing(NamedTuple):
    """Seconds of one call over ``samples`` samples of ``calls`` calls each."""

    median: float
    low: float  # first quartile
    high: float  # third quartile
    samples: int
    calls: int

    @classmethod
    def of(cls, seconds: list[float], calls: int = 1) -> Timing:
        """The summary of the samples' seconds a call."""
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
        return cls(median, low, high, len(seconds), calls)

    def of_each(self, repeats: int) -> Timing:
        """The same of one of the ``repeats`` calls that each call was."""
        median, low, high = (value / repeats for value in self[:3])
        return Timing(median, low, high, self.samples, self.calls * repeats)


def all_of(found: Mapping[str, Timing | Exception]) -> dict[str, Timing]:
    """What `interleaved` found; raises what any call raised."""
    times = {}
    for name, one in found.items():
        if isinstance(one, Exception):
            raise one
        times[name] = one
    return times


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    device: torch.device,
    warmup: int = 3,
    rounds: int = 10,
    sample_seconds: float | None = None,
) -> dict[str, Timing | Exception]:
    """Time calls in rounds, each once a round, so that drift of clocks and neighbours' load hits all alike.

    Every other round goes backwards. A call that raises is dropped, and its exception stands for its time.

    Args:
        calls: by name.
        device: where they compute; a GPU is timed with events and waited for after each sample.
        warmup: calls of each that are not timed.
        rounds: samples of each.
        sample_seconds: least length of a sample; None: `SAMPLE_SECONDS` on a GPU, one call on a CPU.
    """
    if sample_seconds is None:
        sample_seconds = SAMPLE_SECONDS if device.type == "cuda" else 0.0
    with on_device(device):
        return _interleaved(calls, device, warmup, rounds, sample_seconds)


def _interleaved(
    calls: Mapping[str, Callable[[], Any]], device: torch.device, warmup: int, rounds: int, sample_seconds: float
) -> dict[str, Timing | Exception]:
    found: dict[str, Timing | Exception] = {}
    repeats: dict[str, int] = {}
    for name, call in calls.items():
        try:
            for _ in range(warmup):
                call()
            synchronize(device)
            repeats[name] = 1
            if sample_seconds:
                repeats[name] = max(1, math.ceil(sample_seconds / max(_sample(call, 1, device), 1e-6)))
        except Exception as error:  # whatever one variant raises, the others are measured
            found[name] = error
    seconds: dict[str, list[float]] = {name: [] for name in repeats}
    for turn in range(rounds):
        for name in list(repeats) if turn % 2 == 0 else reversed(list(repeats)):
            try:
                seconds[name].append(_sample(calls[name], repeats[name], device))
            except Exception as error:
                found[name] = error
                del repeats[name]
    found.update((name, Timing.of(seconds[name], repeats[name])) for name in repeats)
    return {name: found[name] for name in calls}


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _sample(call: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Seconds a call."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats
