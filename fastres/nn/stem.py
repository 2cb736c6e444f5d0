"""The stem: convolution, BatchNorm, ReLU and perhaps a max-pool."""

from __future__ import annotations

from torch import Tensor, nn

from fastres.nn.blocks import fused_residual
from fastres.nn.norm import conv_of, layer_of, to_nchw, to_nhwc, track
from fastres.ops import Layer, Norm, residual_chain, stem
from fastres.ops.layers import Pad, output_hw
from fastres.reference.notebook import SameMaxPool2d, same_padding
from fastres.reference.speed import WidenAndHalve as EagerWidenAndHalve


def fused_stem(x: Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d, pool: nn.Module | None) -> Tensor:
    """``pool(relu(bn(conv(x))))`` and the update of the running statistics; pool None or identity: no pool.

    A pool that `pool_is_fusable` does not take is called.
    """
    if pool is None or isinstance(pool, nn.Identity):
        return fused_residual(x, [[(conv, bn)]], residual=False)
    if not pool_is_fusable(pool):
        return pool(fused_residual(x, [[(conv, bn)]], residual=False))
    nhwc = to_nhwc(x)
    layer = layer_of(conv, bn, tuple(nhwc.shape[1:3]))
    hw = output_hw(tuple(nhwc.shape[1:3]), conv.kernel_size, layer.stride, layer.pad)
    out, statistics = stem(nhwc, layer, *_pool_geometry(pool, hw))
    track([bn], [statistics])
    return to_nchw(out)


def fused_conv_relu(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """``relu(conv(x))`` of a convolution with bias, to the operations a frozen BatchNorm of mean 0 and variance 1."""
    nhwc = to_nhwc(x)
    weight, stride, pad = conv_of(conv, tuple(nhwc.shape[1:3]))
    zeros = conv.bias.new_zeros(conv.out_channels)
    norm = Norm(None, conv.bias, zeros, zeros + 1, eps=0.0)
    return to_nchw(residual_chain(nhwc, [[Layer(weight, norm, stride, pad)]])[0])


def pool_is_fusable(pool: nn.Module) -> bool:
    """Whether the fused stem can stand for it: a square max-pool without dilation, ceil mode and indices."""
    if isinstance(pool, SameMaxPool2d):
        return True
    return (
        type(pool) is nn.MaxPool2d
        and all(_is_square(size) for size in (pool.kernel_size, pool.stride, pool.padding))
        and pool.dilation == 1
        and not pool.ceil_mode
        and not pool.return_indices
    )


def _is_square(size: int | tuple[int, int]) -> bool:
    return isinstance(size, int) or size[0] == size[1]


def _pool_geometry(pool: nn.MaxPool2d | SameMaxPool2d, hw: tuple[int, int]) -> tuple[int, int, Pad]:
    """Kernel, stride and padding of a pool over ``hw``."""
    if isinstance(pool, SameMaxPool2d):
        rows, columns = (same_padding(size, pool.kernel, pool.stride) for size in hw)
        return pool.kernel, pool.stride, (rows[0], columns[0], rows[1], columns[1])
    kernel, stride, padding = (
        size if isinstance(size, int) else size[0] for size in (pool.kernel_size, pool.stride, pool.padding)
    )
    return kernel, stride, (padding,) * 4


class WidenAndHalve(EagerWidenAndHalve):
    """`fastres.reference.speed.WidenAndHalve`, fused."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to channels-last [N, C', H/2, W/2]."""
        return fused_stem(x, self.conv1, self.bn1, None if min(x.shape[2:]) == 1 else self.maxpool)


class Stem(nn.Module):
    """7x7 stride-2 convolution, BatchNorm, ReLU and 3x3 stride-2 max-pool, or other sizes of the same.

    Args:
        inputs, outputs: channels of x [N, inputs, H, W] and of the result.
        kernel, stride: of the convolution, padded by half the kernel.
        pool: whether the 3x3 stride-2 max-pool follows.
    """

    def __init__(self, inputs: int = 3, outputs: int = 64, kernel: int = 7, stride: int = 2, pool: bool = True):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if pool else None

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] to channels-last [N, outputs, H', W']."""
        return fused_stem(x, self.conv1, self.bn1, self.maxpool)
