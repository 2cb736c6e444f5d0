"""One training step looked into: kernels by name, their sum beside the step's time, the host's share, a CUDA graph."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.trace import kernels
from bench.workloads import Setting
from fastres.measure import Step, Workload, all_of, interleaved, synchronize

NAMES = ("resnet50 224", "notebook", "resnet50 CIFAR", "resnet18 CIFAR", "resnet110")
EACH_LAUNCH = "fused Triton"  # the variant whose launches are kept one by one, for `bench.machine.compare`
VARIANTS = ("eager", "compile", "fused", EACH_LAUNCH, "fused graph")


def cases(setting: Setting) -> dict[str, Callable[[], dict[str, Any]]]:
    """See `bench.stages`."""
    workloads = setting.workloads()
    names = setting.pick(NAMES, ("notebook", "resnet50 CIFAR"), tuple(workloads))
    return {
        f"{name} | {variant}": partial(look_into, setting, workloads[name], variant)
        for name in names
        for variant in VARIANTS
        if variant in setting.variants(name)
    }


def look_into(setting: Setting, workload: Workload, variant: str) -> dict[str, Any]:
    """Step time, the time that the host needs to give a step out, and `kernels`."""
    torch._dynamo.reset()
    step = Step(workload, variant, setting.device, setting.dtype)
    step.settle()
    timing = all_of(interleaved({variant: step}, setting.device, setting.warmup, setting.rounds))[variant]
    return {
        "workload": workload.model,
        "batch": workload.batch,
        "image_size": workload.image_size,
        "variant": variant,
        "step": timing._asdict(),
        "host_seconds": host_seconds(step, setting.device),
        "kernels": kernels(step, setting.device, each_launch=variant == EACH_LAUNCH),
    }


def host_seconds(step: Step, device: torch.device) -> float:
    """Seconds until the call returns, with the device idle before: on a GPU what giving out the launches costs."""
    synchronize(device)
    start = time.perf_counter()
    step()
    elapsed = time.perf_counter() - start
    synchronize(device)
    return elapsed
