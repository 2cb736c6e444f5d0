"""A convolution with its BatchNorm and ReLU, and the stem of a network, as modules of their own."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ConvBNReLU(nn.Module):
    """Convolution without bias, BatchNorm and, unless ``relu`` is False, ReLU.

    Args:
        inputs, outputs: channels of x [N, inputs, H, W] and of the result.
        kernel, stride: of the convolution.
        padding: on all sides; None: half the kernel.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int = 1,
        padding: int | None = None,
        relu: bool = True,
    ):
        super().__init__()
        padding = kernel // 2 if padding is None else padding
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] to [N, outputs, H', W']."""
        y = self.bn(self.conv(x))
        return F.relu(y) if self.relu else y


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
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if pool else None

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] to [N, outputs, H', W']."""
        x = self.relu(self.bn1(self.conv1(x)))
        return x if self.maxpool is None else self.maxpool(x)
