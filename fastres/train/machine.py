"""Where and in which precision a run computes: device choice, autocast dtype, determinism, peak memory."""

from __future__ import annotations

import os
import resource

import torch

from fastres.errors import FastresError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """``auto`` is the first CUDA device or else the CPU.

    Raises:
        FastresError: for a device that PyTorch does not know or that this machine lacks.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise FastresError(f"--device {name!r} is unknown: choose auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise FastresError(f"--device {name!r} is not supported: choose auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise FastresError(
            f"--device {name} asks for a CUDA device, but PyTorch sees {torch.cuda.device_count()} here: "
            "use --device cpu, or check the driver and that PyTorch has CUDA"
        )
    return device


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products have hardware of their own: tensor cores from sm_80, AMX on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    try:
        with open("/proc/cpuinfo") as lines:
            return "amx_bf16" in lines.read()
    except OSError:
        return False


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype that convolutions compute in."""
    if precision == "auto":
        precision = "bf16" if has_fast_bf16(device) else "fp32"
    return DTYPES[precision]


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Autocast to ``dtype``; float32 means off."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def make_deterministic() -> None:
    """Only deterministic algorithms, on every device; an operation that has none then raises."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def peak_memory_mib(device: torch.device) -> float:
    """Highest memory so far in MiB: allocated tensors on a GPU, resident set of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
