"""Every tensor that a launcher, a pass or an operation makes is made here, or by PyTorch out of another one.

Nothing depends on PyTorch's default dtype and device, and tests can poison and fence what launchers write.
"""

import torch
from torch import Tensor

from fastres.kernels.types import Moments


def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised contiguous tensor on ``like``'s device, in its dtype unless told otherwise."""
    return like.new_empty(shape, dtype=dtype)


def moments(like: Tensor, tiles: int, channels: int) -> Moments:
    """Uninitialised statistics of that many row tiles, fp32."""
    return Moments(
        empty(like, tiles, dtype=torch.float32), *(empty(like, tiles, channels, dtype=torch.float32) for _ in range(2))
    )


def filled(like: Tensor, value: float, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """The like of `empty`, each element ``value``."""
    return like.new_full(shape, value, dtype=dtype)


def indices(like: Tensor, count: int) -> Tensor:
    """int64 0 ... count - 1 on ``like``'s device."""
    return torch.arange(count, dtype=torch.int64, device=like.device)
