"""From ``nn.Conv2d`` and ``nn.BatchNorm2d``, the holders of parameters, to what the fused operations take, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from fastres.kernels.geometry import extent
from fastres.nn.roles import Padding, declared_padding
from fastres.ops import Conv, Layer, Norm, Statistics, update_running
from fastres.ops.layers import Pad


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


class Geometry(NamedTuple):
    """A convolution's sizes."""

    kernel_size: tuple[int, int]
    stride: int
    padding: tuple[int, int] | str
    declared: Padding | None  # padding that depends on the input's size, see `declare_convolution`
    dilation: int = 1

    def pad(self, hw: Sequence[int]) -> Pad:
        """Padding on each side for an input of height and width ``hw``."""
        if self.declared is not None:
            return self.declared(hw, self.kernel_size, self.stride)
        if self.padding == "same":
            rows, columns = (extent(size, self.dilation) - 1 for size in self.kernel_size)
            return rows // 2, columns // 2, rows - rows // 2, columns - columns // 2
        if self.padding == "valid":
            return 0, 0, 0, 0
        return *self.padding, *self.padding


def geometry_of(conv: Any) -> Geometry:
    """Of a convolution that is not `unsupported`."""
    return Geometry(conv.kernel_size, conv.stride[0], conv.padding, declared_padding(conv), conv.dilation[0])


def conv_of(conv: Any, hw: Sequence[int]) -> Conv:
    """The convolution as it meets an input of height and width ``hw``."""
    geometry = geometry_of(conv)
    return Conv(conv.weight, geometry.stride, geometry.pad(hw), geometry.dilation)


def norm_of(bn: Any, act: str = "relu") -> Norm:
    """The BatchNorm in its present mode: by the batch when training or without running statistics, or else frozen.

    Args:
        act: the activation behind it, of `fastres.kernels.types.ACTIVATIONS`.
    """
    frozen = isinstance(bn, FrozenBatchNorm2d)
    if not frozen and (bn.training or bn.running_mean is None):
        return Norm(bn.weight, bn.bias, eps=bn.eps, group=group_of(bn), act=act)
    return Norm(bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps, act=act)


def group_of(bn: Any) -> str | None:
    """Name of the process group that it takes its statistics over, as ``nn.SyncBatchNorm`` does when training."""
    if not (isinstance(bn, nn.SyncBatchNorm) and bn.training and dist.is_available() and dist.is_initialized()):
        return None
    group: Any = bn.process_group or dist.group.WORLD
    return group.group_name if group.size() > 1 else None


def layer_of(conv: Any, bn: Any, hw: Sequence[int], act: str = "relu") -> Layer:
    """Convolution and BatchNorm as they meet an input of height and width ``hw``; ``act`` as `norm_of` has it."""
    weight, stride, pad, dilation = conv_of(conv, hw)
    return Layer(weight, norm_of(bn, act), stride, pad, dilation)


@torch.no_grad()
def track(norms: Sequence[Any], statistics: Sequence[Statistics]) -> None:
    """Update running statistics and counters as ``nn.BatchNorm2d.forward`` does, in the same modes, all at once.

    A recomputing checkpoint repeats them, as it repeats those of
    ``nn.BatchNorm2d`` (only the last block's it may leave out: its recomputation can end in the operation), unless it
    lends the modules copies of their buffers meanwhile, as `fastres.checkpointing` does.
    """
    tracking = [
        (bn, used)
        for bn, used in zip(norms, statistics, strict=True)
        if bn.training
        and not isinstance(bn, FrozenBatchNorm2d)
        and bn.track_running_stats
        and bn.running_mean is not None
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


def _momentum(bn: Any) -> float | Tensor:
    """Weight of this batch; of a cumulative average on the device, so without waiting for it."""
    if bn.momentum is not None:
        return bn.momentum
    return 0.0 if bn.num_batches_tracked is None else 1.0 / bn.num_batches_tracked.to(bn.running_mean.dtype)
