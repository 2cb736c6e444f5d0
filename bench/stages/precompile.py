"""Every kernel that the campaign's networks launch, compiled by all cores into Triton's cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from bench.precompile import Compiler, Job, networks
from bench.workloads import Setting

DRY_KERNELS, DRY_ARCHITECTURE = 2, 90


def cases(setting: Setting) -> dict[str, Callable[[], dict[str, Any]]]:
    """See `bench.stages`; none on a CPU, which launches no such kernel."""
    if setting.device.type != "cuda" and not setting.dry:
        return {}
    most = DRY_KERNELS if setting.dry else None
    return {name: partial(_compile, setting, jobs, most) for name, jobs in networks(setting).items()}


def _compile(setting: Setting, jobs: list[Job], most: int | None) -> dict[str, Any]:
    return _compiler(setting).compile(jobs, most)


@cache
def _compiler(setting: Setting) -> Compiler:
    if setting.dry:
        return Compiler(DRY_ARCHITECTURE, 1)
    major, minor = torch.cuda.get_device_capability(setting.device)
    return Compiler(10 * major + minor)
