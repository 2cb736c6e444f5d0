"""Kernels of a call, from PyTorch's profiler: how many, which, and how long each kind takes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fastres.measure import synchronize

KERNEL, MEMORY = "kernel", ("gpu_memcpy", "gpu_memset")  # categories of the profiler's trace
SHOWN = 120  # characters of a kernel's name


def kernels(call: Callable[[], Any], device: torch.device, top: int = 25, each_launch: bool = False) -> dict[str, Any]:
    """What one call launches; on a CPU its ATen operations, without those that others call.

    Args:
        each_launch: also `in_order`, under that name, on a GPU.

    Returns:
        ``launches`` and ``seconds`` of all kernels (CPU: operations, own time), ``copies`` (copies and fills of memory,
        on a GPU), and under ``top`` by falling time the name, count and seconds of the ``top`` first.
    """
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CUDA] if gpu else [ProfilerActivity.CPU]
    synchronize(device)
    with profile(activities=activities) as trace:
        call()
        synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return {**summary(events, gpu, top), **({"in_order": in_order(events)} if gpu and each_launch else {})}


def in_order(events: list[dict[str, Any]]) -> list[list[Any]]:
    """The kernels of a GPU's trace by their begin.

    Returns:
        Of each its name, microseconds, grid, block, registers a thread and bytes of shared memory.
    """
    found = sorted((event for event in events if event.get("cat") == KERNEL), key=lambda event: event["ts"])
    facts = ("grid", "block", "registers per thread", "shared memory")
    return [
        [event["name"][:SHOWN], round(event["dur"], 3), *(event["args"].get(fact) for fact in facts)] for event in found
    ]


def summary(events: list[dict[str, Any]], gpu: bool, top: int) -> dict[str, Any]:
    """`kernels` of a trace in Chrome's format."""
    wanted = [event for event in events if event.get("cat") == (KERNEL if gpu else "cpu_op")]
    total: dict[str, list[float]] = {}
    for event, microseconds in zip(wanted, _own_time(wanted)):
        entry = total.setdefault(event["name"], [0, 0.0])
        entry[0] += 1
        entry[1] += microseconds / 1e6
    rows = sorted(total.items(), key=lambda item: -item[1][1])
    return {
        "launches": len(wanted),
        "seconds": sum(seconds for _, (_, seconds) in rows),
        "copies": sum(event.get("cat") in MEMORY for event in events),
        "top": [{"name": name[:SHOWN], "count": count, "seconds": seconds} for name, (count, seconds) in rows[:top]],
    }


def _own_time(events: list[dict[str, Any]]) -> list[float]:
    """Microseconds of each event without those of the events inside it, thread by thread."""
    own = [float(event["dur"]) for event in events]
    open_events: dict[Any, list[int]] = {}
    for index in sorted(range(len(events)), key=lambda i: (events[i]["ts"], -events[i]["dur"])):
        event = events[index]
        stack = open_events.setdefault((event.get("pid"), event.get("tid")), [])
        while stack and events[stack[-1]]["ts"] + events[stack[-1]]["dur"] <= event["ts"]:
            stack.pop()
        if stack:
            own[stack[-1]] -= event["dur"]
        stack.append(index)
    return own
