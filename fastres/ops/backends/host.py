"""What a call costs the host when its walk is made again: PyTorch's operations and launches, by their number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastres.ops.backends.replay import Operation, Recording

# Of one in a repeated walk, with the driver's own time. On an H100's host (PyTorch 2.11) ResNet-18 took 2.7 ms a step
# longer with the vendor's convolutions and the passes beside them than without.
OPERATION, LAUNCH = 0.025, 0.004


def host_milliseconds(call: Callable[[], Any]) -> float:
    """Milliseconds of the host for a call, which is made once."""
    recording = Recording([])
    with recording:
        call()
    operations = sum(isinstance(step, Operation) for step in recording.steps)
    return operations * OPERATION + (len(recording.steps) - operations) * LAUNCH
