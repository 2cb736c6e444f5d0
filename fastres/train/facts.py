"""What a run's figures depend on beside its options."""

from __future__ import annotations

import platform
from typing import Any

import torch

import fastres
from fastres.train.arithmetic import run_flops
from fastres.train.trainer import Trainer


def run_facts(trainer: Trainer) -> dict[str, Any]:
    """Id of the run, parameters, arithmetic, data, digest of the weights that it started from, device, dtype, backend
    and versions, as plain values.
    """
    device = trainer.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "flops": run_flops(trainer),
        "run": trainer.run,
        "data": trainer.dataset.label,
        "digest": trainer.dataset.digest,
        "initial": trainer.weights,
        "device": f"{device} ({name}, {torch.get_num_threads()} threads)",
        "dtype": str(trainer.dtype).removeprefix("torch."),
        "backend": trainer.backend,
        "versions": {"fastres": fastres.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }
