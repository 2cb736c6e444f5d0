"""Errors that mean: this needs more memory than there is."""

from __future__ import annotations

import torch

# PyTorch has a type for GPUs only; on a CPU its allocator, oneDNN and C++ each have their own words
_WORDS = ("defaultcpuallocator", "can't allocate memory", "cannot allocate memory", "not enough memory", "bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was short, on a GPU or a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in _WORDS)


def release_memory(device: torch.device) -> None:
    """Give what PyTorch keeps for later back to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
