"""Peak memory of a training step of each network as each variant, one variant at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.depth import in_own_process
from bench.workloads import Setting
from fastres.measure import Workload
from fastres.measure.step import peak_memory

VARIANTS = ("eager NCHW", "eager", "compile", "fused", "fused recompute", "fused compile", "fused graph")


def cases(setting: Setting) -> dict[str, Callable[[], dict[str, Any]]]:
    """See `bench.stages`."""
    variants = setting.pick(VARIANTS, ("eager", "compile", "fused", "fused recompute"), VARIANTS)
    return {
        f"{name} | {variant}": partial(measure, setting, workload, variant)
        for name, workload in setting.workloads().items()
        for variant in variants
        if variant in setting.variants(name)
    }


def measure(setting: Setting, workload: Workload, variant: str) -> dict[str, Any]:
    """`peak_memory`; on a CPU in a process of its own."""
    where = {
        "workload": workload.model,
        "batch": workload.batch,
        "image_size": workload.image_size,
        "variant": variant,
    }
    arguments = (workload, variant, setting.device, setting.dtype)
    if setting.device.type == "cpu" and not setting.dry:
        return {**where, **in_own_process(_with_threads, torch.get_num_threads(), *arguments)}
    torch._dynamo.reset()
    return {**where, **peak_memory(*arguments)}


def _with_threads(threads: int, *arguments: Any) -> dict[str, float]:
    torch.set_num_threads(threads)
    return peak_memory(*arguments)
