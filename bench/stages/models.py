"""Training steps of whole networks as every peer, in turn; then a few peers over batches."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.workloads import SWEEP_PEERS, Setting
from fastres.measure import Workload
from fastres.measure.command import measure_steps


def cases(setting: Setting) -> dict[str, Callable[[], dict[str, Any]]]:
    """See `bench.stages`."""
    found: dict[str, Callable[[], dict[str, Any]]] = {
        name: partial(measure, setting, one, setting.peers(name)) for name, one in setting.workloads().items()
    }
    for name, one in setting.sweeps().items():
        peers = [peer for peer in SWEEP_PEERS if peer in setting.peers(name)]
        found[name] = partial(measure, setting, one, peers)
    return found


def measure(setting: Setting, workload: Workload, peers: list[str]) -> dict[str, Any]:
    """`measure_steps`, after the memory of the case before is given back."""
    gc.collect()
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
    return measure_steps(
        workload, peers, setting.device, setting.dtype, setting.rounds, setting.warmup, setting.backend
    )
