"""Training steps of whole networks, a few variants a case; then over batches.

Every case has eager PyTorch in channels-last beside its variants, so that ratios are of one case: clocks and neighbours
may differ between cases, which can be hours apart. No case compiles for longer than a slice of the campaign has.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.workloads import Setting
from fastres.measure import Workload
from fastres.measure.command import measure_steps

BASELINE = "eager"
GROUPS = {
    "fused": (BASELINE, "fused", "fused Triton", "vendor"),
    "compile": (BASELINE, "fused", "compile"),
    "fused graph": (BASELINE, "fused", "fused graph", "fused graph PDL"),
    "fused compile": (BASELINE, "fused compile"),
    "layout and memory": (BASELINE, "eager NCHW", "fused recompute"),
    "compile graphs": (BASELINE, "compile graphs"),
    "compile max-autotune": (BASELINE, "compile max-autotune"),
}
SWEEP_GROUPS = {"batches": (BASELINE, "fused", "fused graph"), "batches, compile": (BASELINE, "compile")}


def cases(setting: Setting) -> dict[str, Callable[[], dict[str, Any]]]:
    """See `bench.stages`."""
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for workloads, groups in ((setting.workloads(), GROUPS), (setting.sweeps(), SWEEP_GROUPS)):
        for group, members in groups.items():
            for name, one in workloads.items():
                variants = [variant for variant in members if variant in setting.variants(name.partition(",")[0])]
                if variants != [BASELINE]:
                    found[f"{name} | {group}"] = partial(measure, setting, one, variants)
    return found


def measure(setting: Setting, workload: Workload, variants: list[str]) -> dict[str, Any]:
    """`measure_steps`, after the memory of the case before is given back."""
    gc.collect()
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
    return measure_steps(workload, variants, setting.device, setting.dtype, setting.rounds, setting.warmup)
