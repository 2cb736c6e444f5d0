"""The small bottleneck network of the TensorFlow-slim notebook, layer for layer.

For images of 96x96: stem 48x48x32, max-pool 24x24x32, two blocks of 128 (24x24), two blocks of 512 (12x12), logits.
Three habits of slim matter: 'SAME' padding puts the odd pixel at the end, a block's stride sits in the last unit of its
stage (so the shortcut of that unit is an identity, subsampled), and `batch_norm` has no gamma unless asked for one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.checkpointing import run_blocks
from fastres.reference.resnet import conv1x1

STEM_WIDTH = 32
# (inputs, outputs, stride) of each block; the 3x3 convolution inside has a quarter of the outputs
BLOCKS = ((32, 128, 1), (128, 128, 1), (128, 512, 1), (512, 512, 2))
EPSILON, DECAY = 1e-3, 0.999  # slim's defaults


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's 'SAME' padding (before, after) of one axis: ceil(size / stride) outputs, the odd pixel after."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def pad_same(x: Tensor, kernel: int, stride: int, value: float = 0.0) -> Tensor:
    """Pad [N, C, H, W] so that a valid ``kernel`` x ``kernel`` window of that stride gives TensorFlow's 'SAME'."""
    top, bottom = same_padding(x.shape[2], kernel, stride)
    left, right = same_padding(x.shape[3], kernel, stride)
    return F.pad(x, (left, right, top, bottom), value=value)


class SameConv2d(nn.Conv2d):
    """Convolution without bias and with TensorFlow's 'SAME' padding."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1):
        super().__init__(inputs, outputs, kernel, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(pad_same(x, self.kernel_size[0], self.stride[0]))


class SameMaxPool2d(nn.Module):
    """Max-pool with TensorFlow's 'SAME' padding, whose pixels never win."""

    def __init__(self, kernel: int, stride: int):
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(pad_same(x, self.kernel, self.stride, -float("inf")), self.kernel, self.stride)


class Subsample(nn.Module):
    """slim's `subsample`: a 1x1 max-pool, which keeps every ``stride``-th pixel."""

    def __init__(self, stride: int):
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, :: self.stride, :: self.stride]


class ShiftedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm with a beta and without gamma.

    In training on a GPU it is given ones: without gamma PyTorch (2.11) has no gradient of beta for channels-last
    tensors there.
    """

    def __init__(self, channels: int, eps: float, momentum: float):
        super().__init__(channels, eps, momentum)
        self.register_parameter("weight", None)

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and x.is_cuda):
            return super().forward(x)
        counter, momentum = self.num_batches_tracked, self.momentum
        assert counter is not None and momentum is not None
        counter.add_(1)
        ones = torch.ones_like(self.bias)
        return F.batch_norm(x, self.running_mean, self.running_var, ones, self.bias, True, momentum, self.eps)


def batch_norm(channels: int, gamma: bool) -> nn.BatchNorm2d:
    """slim's `batch_norm`: with ``gamma`` False the scale is 1 and no parameter."""
    return (nn.BatchNorm2d if gamma else ShiftedBatchNorm2d)(channels, eps=EPSILON, momentum=1 - DECAY)


class NotebookBlock(nn.Module):
    """``relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x))))))) + shortcut(x))``, [N, inputs, H, W] to [N, outputs, ...].

    The shortcut is a 1x1 convolution with BatchNorm where the widths differ, or else x, subsampled by the stride.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, gamma: bool, residual: bool = True):
        super().__init__()
        width = outputs // 4
        self.conv1 = conv1x1(inputs, width)
        self.bn1 = batch_norm(width, gamma)
        self.conv2 = SameConv2d(width, width, 3, stride)
        self.bn2 = batch_norm(width, gamma)
        self.conv3 = conv1x1(width, outputs)
        self.bn3 = batch_norm(outputs, gamma)
        self.relu = nn.ReLU(inplace=True)
        self.residual = residual
        self.downsample: nn.Module | None = None
        if residual and inputs != outputs:
            self.downsample = nn.Sequential(conv1x1(inputs, outputs, stride), batch_norm(outputs, gamma))
        elif residual and stride != 1:
            self.downsample = Subsample(stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        if self.residual:
            y = y + (x if self.downsample is None else self.downsample(x))
        return self.relu(y)


class NotebookResNet(nn.Module):
    """The TensorFlow-slim notebook's bottleneck network.

    Args:
        num_classes: logits [N, num_classes].
        gamma: give BatchNorm a scale; slim's default has none.
        relu_logits: apply ReLU to the logits, as slim's `fully_connected` does unless told otherwise: a defect of the
            notebook, kept as an option.
        residual: without it, the plain twin.
        checkpoint_every: see `run_blocks`.
    """

    def __init__(
        self,
        num_classes: int = 10,
        gamma: bool = False,
        relu_logits: bool = False,
        residual: bool = True,
        checkpoint_every: int = 0,
    ):
        super().__init__()
        self.conv1 = SameConv2d(3, STEM_WIDTH, 5, stride=2)
        self.bn1 = batch_norm(STEM_WIDTH, gamma)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = SameMaxPool2d(3, stride=2)
        blocks = [NotebookBlock(*shape, gamma, residual) for shape in BLOCKS]
        self.layer1 = nn.Sequential(*blocks[:2])
        self.layer2 = nn.Sequential(*blocks[2:])
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(BLOCKS[-1][1], num_classes)
        self.relu_logits = relu_logits
        self.checkpoint_every = checkpoint_every
        for module in self.modules():  # slim's default: Glorot & Bengio 2010, uniform, biases 0
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, 3, H, W]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = run_blocks([*self.layer1, *self.layer2], x, self.checkpoint_every)
        logits = self.fc(self.avgpool(x).flatten(1))
        return F.relu(logits) if self.relu_logits else logits
