"""Peak memory of a training step of each network as each peer, one peer at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.depth import in_own_process
from bench.workloads import Setting
from fastres.measure import Workload
from fastres.measure.step import peak_memory

PEERS = ("eager NCHW", "eager", "compile", "fused", "fused fewer", "fused compile", "fused graph")


def cases(setting: Setting) -> dict[str, Callable[[], dict[str, Any]]]:
    """See `bench.stages`."""
    peers = setting.pick(PEERS, ("eager", "compile", "fused", "fused fewer"), PEERS)
    return {
        f"{name} | {peer}": partial(measure, setting, workload, peer)
        for name, workload in setting.workloads().items()
        for peer in peers
        if peer in setting.peers(name)
    }


def measure(setting: Setting, workload: Workload, peer: str) -> dict[str, Any]:
    """`peak_memory`; on a CPU in a process of its own."""
    where = {
        "workload": workload.model,
        "batch": workload.batch,
        "image_size": workload.image_size,
        "peer": peer,
    }
    arguments = (workload, peer, setting.device, setting.dtype)
    if setting.device.type == "cpu" and not setting.dry:
        return {**where, **in_own_process(_with_threads, torch.get_num_threads(), *arguments)}
    torch._dynamo.reset()
    return {**where, **peak_memory(*arguments)}


def _with_threads(threads: int, *arguments: Any) -> dict[str, float]:
    torch.set_num_threads(threads)
    return peak_memory(*arguments)
