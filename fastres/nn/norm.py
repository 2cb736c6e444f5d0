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
from fastres.ops import Conv, Layer, Norm, Statistics
from fastres.ops.layers import Pad
from fastres.ops.running import Running


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


class Tracking:
    """Moves running statistics and counters as ``nn.BatchNorm2d.forward`` does, in the same modes, all at once.

    A recomputing checkpoint repeats them, as it repeats those of
    ``nn.BatchNorm2d`` (only the last block's it may leave out: its recomputation can end in the operation), unless it
    lends the modules copies of their buffers meanwhile, as `fastres.checkpointing` does.

    Args:
        norms: the BatchNorms in their present modes, with their present buffers.
        counts: pixels that each took its statistics over.
    """

    def __init__(self, norms: Sequence[Any], counts: Sequence[int]):
        pairs = enumerate(zip(norms, counts, strict=True))
        tracking = [(place, bn, count) for place, (bn, count) in pairs if _is_tracking(bn)]
        groups = [tracking]
        if len({bn for _, bn, _ in tracking}) < len(tracking):  # one that is used twice moves twice, one after another
            groups = [[one] for one in tracking]
        self._groups = [_Group(group) for group in groups if group]

    def move(self, coefs: Sequence[Tensor]) -> None:
        """Move them towards those of a batch: coefficients of each BatchNorm, see `Running.move`."""
        with torch.no_grad():
            for group in self._groups:
                group.move(coefs)


class _Group:
    """BatchNorms that move together: the place of each among the coefficients, itself, and its pixels."""

    def __init__(self, members: Sequence[tuple[int, Any, int]]):
        self._places = [place for place, _, _ in members]
        self.counters = [bn.num_batches_tracked for _, bn, _ in members if bn.num_batches_tracked is not None]
        self._fixed = [bn.momentum for _, bn, _ in members]
        # A cumulative average's momentum is one over the number of batches, so they are counted first.
        self._cumulative = [bn.num_batches_tracked for _, bn, _ in members if bn.momentum is None]
        self._dtypes = [bn.running_mean.dtype for _, bn, _ in members if bn.momentum is None]
        means, variances = ([getattr(bn, name) for _, bn, _ in members] for name in ("running_mean", "running_var"))
        counters = [] if self._cumulative else self.counters
        self._running = Running(means, variances, [count for _, _, count in members], counters)

    def move(self, coefs: Sequence[Tensor]) -> None:
        momenta = self._fixed
        if self._cumulative:
            if self.counters:
                torch._foreach_add_(self.counters, 1)
            left = iter(map(_cumulative_momentum, self._cumulative, self._dtypes))
            momenta = [next(left) if momentum is None else momentum for momentum in self._fixed]
        self._running.move([coefs[place] for place in self._places], momenta)


def track(norms: Sequence[Any], statistics: Sequence[Statistics]) -> None:
    """`Tracking` of these BatchNorms once."""
    Tracking(norms, [count for _, count in statistics]).move([coef for coef, _ in statistics])


def _is_tracking(bn: Any) -> bool:
    return (
        bn.training and not isinstance(bn, FrozenBatchNorm2d) and bn.track_running_stats and bn.running_mean is not None
    )


def _cumulative_momentum(batches: Tensor | None, dtype: torch.dtype) -> float | Tensor:
    """Weight of this batch in a cumulative average, on the device, so without waiting for it."""
    return 0.0 if batches is None else 1.0 / batches.to(dtype)
