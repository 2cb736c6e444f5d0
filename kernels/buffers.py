"""Every tensor that a launcher makes is made here, so that tests can poison and fence all of them."""

import torch
from torch import Tensor


def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised contiguous tensor on ``like``'s device, in its dtype unless told otherwise."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)
