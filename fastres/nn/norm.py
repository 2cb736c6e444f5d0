"""From ``nn.Conv2d`` and ``nn.BatchNorm2d``, the holders of parameters, to what the fused operations take, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastres.ops import Conv, Layer, Norm, Statistics, update_running
from fastres.reference.notebook import SameConv2d, same_padding


def to_nhwc(x: Tensor) -> Tensor:
    """[N, C, H, W] as [N, H, W, C]: a view, which the operations copy only where x is not channels-last.

    Raises:
        RuntimeError: for a tensor that is not 4-D.
    """
    if x.dim() != 4:
        raise RuntimeError(f"expected 4D input (got {x.dim()}D input)")
    return x.permute(0, 2, 3, 1)


def to_nchw(x: Tensor) -> Tensor:
    """[N, H, W, C] as channels-last [N, C, H, W], a view."""
    return x.permute(0, 3, 1, 2)


def conv_of(conv: nn.Conv2d, hw: tuple[int, int]) -> Conv:
    """The convolution as it meets an input of height and width ``hw``."""
    (kernel_h, kernel_w), stride = conv.kernel_size, conv.stride[0]
    if isinstance(conv, SameConv2d):
        rows, columns = same_padding(hw[0], kernel_h, stride), same_padding(hw[1], kernel_w, stride)
        pad = (rows[0], columns[0], rows[1], columns[1])
    elif conv.padding == "same":
        pad = ((kernel_h - 1) // 2, (kernel_w - 1) // 2, kernel_h // 2, kernel_w // 2)
    elif conv.padding == "valid":
        pad = (0, 0, 0, 0)
    else:
        pad = (*conv.padding, *conv.padding)
    return Conv(conv.weight, stride, pad)


def norm_of(bn: nn.BatchNorm2d | nn.SyncBatchNorm) -> Norm:
    """The BatchNorm in its present mode: by the batch when training or without running statistics, or else frozen."""
    if bn.training or bn.running_mean is None:
        return Norm(bn.weight, bn.bias, eps=bn.eps, group=group_of(bn))
    return Norm(bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps)


def group_of(bn: nn.BatchNorm2d | nn.SyncBatchNorm) -> str | None:
    """Name of the process group that it takes its statistics over, as ``nn.SyncBatchNorm`` does when training."""
    if not (isinstance(bn, nn.SyncBatchNorm) and bn.training and dist.is_available() and dist.is_initialized()):
        return None
    group = bn.process_group or dist.group.WORLD
    return group.group_name if group.size() > 1 else None


def layer_of(conv: nn.Conv2d, bn: nn.BatchNorm2d, hw: tuple[int, int]) -> Layer:
    """Convolution and BatchNorm as they meet an input of height and width ``hw``."""
    weight, stride, pad = conv_of(conv, hw)
    return Layer(weight, norm_of(bn), stride, pad)


@torch.no_grad()
def track(norms: Sequence[nn.BatchNorm2d | nn.SyncBatchNorm], statistics: Sequence[Statistics]) -> None:
    """Update running statistics and counters as ``nn.BatchNorm2d.forward`` does, in the same modes, all at once.

    A recomputing checkpoint repeats them, as it repeats those of
    ``nn.BatchNorm2d`` (only the last block's it may leave out: its recomputation can end in the operation), unless it
    lends the modules copies of their buffers meanwhile, as `fastres.reference.checkpointing` does.
    """
    tracking = [
        (bn, used)
        for bn, used in zip(norms, statistics, strict=True)
        if bn.training and bn.track_running_stats and bn.running_mean is not None
    ]
    if len({bn for bn, _ in tracking}) < len(tracking):  # one that is used twice moves twice, one after the other
        for bn, used in tracking:
            track([bn], [used])
        return
    counters = [bn.num_batches_tracked for bn, _ in tracking if bn.num_batches_tracked is not None]
    if counters:
        torch._foreach_add_(counters, 1)
    update_running(
        [bn.running_mean for bn, _ in tracking],
        [bn.running_var for bn, _ in tracking],
        [used for _, used in tracking],
        [_momentum(bn) for bn, _ in tracking],
    )


def _momentum(bn: nn.BatchNorm2d | nn.SyncBatchNorm) -> float | Tensor:
    """Weight of this batch; of a cumulative average on the device, so without waiting for it."""
    if bn.momentum is not None:
        return bn.momentum
    return 0.0 if bn.num_batches_tracked is None else 1.0 / bn.num_batches_tracked.to(bn.running_mean.dtype)


def unsupported(conv: nn.Conv2d, bn: nn.BatchNorm2d | nn.SyncBatchNorm | None = None) -> str | None:
    """Why the fused operations cannot stand for the modules; None: they can."""
    if not isinstance(conv, nn.Conv2d) or (
        type(conv).forward not in (nn.Conv2d.forward, SameConv2d.forward)
    ):
        return f"{type(conv).__name__} is not nn.Conv2d"
    if conv.groups != 1:
        return f"a convolution has groups={conv.groups}"
    if conv.dilation != (1, 1):
        return f"a convolution has dilation={conv.dilation}"
    if conv.bias is not None:
        return "a convolution has a bias"
    if conv.stride[0] != conv.stride[1]:
        return f"a convolution has stride={conv.stride}"
    if conv.padding_mode != "zeros":
        return f"a convolution has padding_mode={conv.padding_mode!r}"
    if bn is not None and not (
        isinstance(bn, (nn.BatchNorm2d, nn.SyncBatchNorm))
        and type(bn).forward in (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)
    ):
        return f"{type(bn).__name__} is not nn.BatchNorm2d"
    return None
