"""Times are taken in turn, and what one call does leaves the others alone."""

import time

import pytest
import torch

from fastres.measure import Timing, interleaved, timing

CPU = torch.device("cpu")


def test_calls_take_turns_after_the_warm_up():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    found = interleaved(calls, CPU, warmup=2, rounds=3)
    assert order == list("aabbcc") + list("abccbaabc")
    assert list(found) == list("abc") and all(time.samples == 3 and time.calls == 1 for time in found.values())


def test_samples_are_as_long_as_asked_for(monkeypatch):
    found = interleaved({"": lambda: time.sleep(0.002)}, CPU, warmup=1, rounds=2, sample_seconds=0.02)[""]
    assert 1 <= found.calls <= 10 and 0.002 <= found.low <= found.median <= found.high  # a busy machine sleeps longer
    clock = iter(range(100))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock) / 100)
    assert interleaved({"": lambda: None}, CPU, warmup=1, rounds=1, sample_seconds=0.045)[""].calls == 5


@pytest.mark.parametrize("survived", [0, 2])
def test_a_call_that_raises_is_dropped(survived):
    calls = []

    def broken():
        calls.append(1)
        if len(calls) > survived:
            raise ValueError("no")

    found = interleaved({"broken": broken, "sound": lambda: None}, CPU, warmup=1, rounds=4)
    assert isinstance(found["broken"], ValueError) and found["sound"].samples == 4
    assert list(found) == ["broken", "sound"] and len(calls) == survived + 1


def test_median_and_quartiles():
    assert Timing.of([5.0, 1.0, 2.0, 3.0, 4.0]) == Timing(3.0, 2.0, 4.0, 5, 1)
    assert Timing.of([7.0], calls=2) == Timing(7.0, 7.0, 7.0, 1, 2)


def test_a_call_of_many_is_one_of_them_by_its_share():
    assert Timing(3.0, 2.0, 4.0, 5, 2).of_each(4) == Timing(0.75, 0.5, 1.0, 5, 8)
