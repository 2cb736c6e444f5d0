"""The machine, and the ceilings that it reaches: bandwidth of a large copy, rate of a large matrix product."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.workloads import Setting
from fastres.measure import Timing, all_of, interleaved
from fastres.train import machine


def cases(setting: Setting) -> dict[str, Callable[[], dict[str, Any]]]:
    """See `bench.stages`."""
    dtypes = [torch.bfloat16, torch.float32]
    return {
        "machine": partial(describe, setting),
        "copy": partial(copy, setting),
        **{f"matmul {str(dtype).removeprefix('torch.')}": partial(matmul, setting, dtype) for dtype in dtypes},
    }


def describe(setting: Setting) -> dict[str, Any]:
    """Device properties and the settings that the measurements run with."""
    facts: dict[str, Any] = {
        "dtype": str(setting.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "fast_bf16": machine.has_fast_bf16(setting.device),
        "convolutions_in_tf32": torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
    }
    if setting.device.type == "cuda":
        found = torch.cuda.get_device_properties(setting.device)
        facts |= {
            "name": found.name,
            "capability": [found.major, found.minor],
            "multiprocessors": found.multi_processor_count,
            "memory_bytes": found.total_memory,
            "l2_bytes": found.L2_cache_size,
        }
    return facts


def copy(setting: Setting) -> dict[str, Any]:
    """Bytes read and written a second by a copy that no cache holds."""
    size = setting.pick(2**30, 2**28, 2**20)
    source = torch.randint(255, (size,), dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    time = _time(setting, lambda: target.copy_(source))
    return {"bytes": 2 * size, "seconds": time._asdict(), "gb_per_second": 2 * size / time.median / 1e9}


def matmul(setting: Setting, dtype: torch.dtype) -> dict[str, Any]:
    """Floating-point operations a second of a large product of random matrices."""
    n = setting.pick(8192, 1536, 64)
    a, b = (torch.randn(n, n, device=setting.device).to(dtype) for _ in range(2))
    time = _time(setting, lambda: a @ b)
    return {"n": n, "seconds": time._asdict(), "tflops": 2 * n**3 / time.median / 1e12}


def _time(setting: Setting, call: Callable[[], Any]) -> Timing:
    return all_of(interleaved({"": call}, setting.device, setting.warmup, setting.rounds))[""]
