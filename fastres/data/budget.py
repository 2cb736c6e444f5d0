"""How much memory decoded images may take: above it they are streamed."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch

GIB = 1 << 30
HOST_SHARE = 1 / 3  # of what is free: the network, its optimizer and its activations may be in the same memory
DEVICE_SHARE = 1 / 2


@dataclass(frozen=True)
class Budget:
    """So many bytes, and why so many, in a few words."""

    bytes: int
    why: str

    def __str__(self) -> str:
        return f"{in_gib(self.bytes)} ({self.why})"


def in_gib(count: int) -> str:
    """A number of bytes as text."""
    return f"{count / GIB:.3g} GiB"


def memory_budget(asked: float | None = None, device: torch.device | str = "cpu") -> Budget:
    """The memory budget for the images of a run.

    Args:
        asked: GiB; None: a third of the host's free memory, of which each of a machine's ranks has its part, and on a
            GPU at most half of the device's.
        device: where resident images would be.
    """
    if asked is not None:
        return Budget(int(asked * GIB), "--memory-budget")
    ranks = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    host = Budget(int(free_memory() * HOST_SHARE / ranks), "a third of the free memory; see --memory-budget")
    device = torch.device(device)
    if device.type != "cuda":
        return host
    free, _ = torch.cuda.mem_get_info(device)
    there = Budget(int(free * DEVICE_SHARE), f"half of {device}'s free memory; see --memory-budget")
    return min(host, there, key=lambda one: one.bytes)


def square_bytes(count: int, side: int) -> int:
    """What so many decoded images take."""
    return count * side * side * 3


def free_memory() -> int:
    """Bytes that the host can give without swapping, and that this process' control group allows it."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    with contextlib.suppress(OSError, ValueError, StopIteration):
        line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:"))
        free = int(line.split()[1]) * 1024
    return min([free, *_allowed_by_groups()])


def _allowed_by_groups() -> list[int]:
    """What each control group of version 2 around this process has left, less what it could drop."""
    left = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        group = Path("/sys/fs/cgroup") / next(line[3:] for line in lines if line.startswith("0::")).lstrip("/")
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # ValueError: "max"
                most = int((folder / "memory.max").read_text())
                used = int((folder / "memory.current").read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                left.append(max(0, most - used + int(stat["inactive_file"])))
    return left
