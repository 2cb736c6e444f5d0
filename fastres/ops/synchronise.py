"""BatchNorm over the ranks of a process group: a layer takes one all-reduce forward and one backward.

What travels is 2C + 1 numbers forward and 2C backward, in fp64: so sums of squares may be subtracted from one another
where a mean is far above the deviations, as rounding is then still below that of the fp32 activations, and the volume
does not grow with the number of ranks. Ranks may have any number of pixels each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastres.kernels.buffers import empty

COUNT = 5  # row behind a BatchNorm's five coefficients: how many pixels all ranks had together


def merge(mean: Tensor, var: Tensor, count: int, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance [C] of all ranks' pixels and how many they are (0-d), all fp64; nothing waits for it.

    Args:
        mean, var: [C], of this rank's pixels, the variance biased.
        count: of this rank's pixels.
        group: name of the process group; all its ranks call this in the same order.
    """
    channels = mean.shape[0]
    sums = empty(mean, 2 * channels + 1, dtype=torch.float64)
    first, second, total = sums.split([channels, channels, 1])
    first.copy_(mean)
    torch.addcmul(var.double(), first, first, out=second)
    total.fill_(1)
    all_reduce(sums.mul_(count), group)
    first /= total
    second /= total
    return first, second.addcmul_(first, first, value=-1).clamp_(min=0), total[0]


def all_reduce(tensor: Tensor, group: str) -> None:
    """Add up over the group's ranks, in place."""
    import torch.distributed as dist  # not every build of PyTorch has it

    dist.all_reduce(tensor, group=dist.distributed_c10d._resolve_process_group(group))
