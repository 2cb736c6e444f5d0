"""Pre-activation bottleneck networks of He et al. 2016, "Identity Mappings in Deep Residual Networks"."""

from __future__ import annotations

from torch import Tensor, nn

from fastres.checkpointing import run_blocks
from fastres.reference.resnet import conv1x1, conv3x3, init_weights


class PreActBottleneck(nn.Module):
    """``shortcut + conv3(relu(bn3(conv2(relu(bn2(conv1(relu(bn1(x)))))))))``.

    Args:
        inputs: channels of x [N, inputs, H, W].
        width: channels of the 3x3 convolution; the output [N, 4*width, H/stride, W/stride] has four times as many.
        downsample: 1x1 convolution of ``relu(bn1(x))`` where shapes change (as in the authors' code, the activation
            is then shared with the shortcut); None: the shortcut is x itself.
        residual: without it, the plain twin: no shortcut.
    """

    expansion = 4

    def __init__(
        self, inputs: int, width: int, stride: int = 1, downsample: nn.Module | None = None, residual: bool = True
    ):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv1x1(inputs, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride)
        self.bn3 = nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, width * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        a = self.relu(self.bn1(x))
        y = self.conv2(self.relu(self.bn2(self.conv1(a))))
        y = self.conv3(self.relu(self.bn3(y)))
        if self.residual:
            y = y + (x if self.downsample is None else self.downsample(a))
        return y


class PreActResNet(nn.Module):
    """3x3 stem of 16, three stages of n bottlenecks of 64, 128 and 256 channels, BN-ReLU, average pool, linear.

    Args:
        depth: 9n + 2 layers.
        num_classes: logits [N, num_classes].
        residual: without it, the plain twin.
        checkpoint_every: see `run_blocks`.

    Raises:
        ValueError: for a depth that is not 9n + 2.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(self, depth: int, num_classes: int = 10, residual: bool = True, checkpoint_every: int = 0):
        super().__init__()
        blocks_a_stage, rest = divmod(depth - 2, 9)
        if rest or blocks_a_stage < 1:
            raise ValueError(f"depth {depth} is not 9n + 2: take 11, 20, 29, ...")
        self.conv1 = conv3x3(3, 16)
        self.checkpoint_every = checkpoint_every
        inputs = 16
        for stage in range(3):
            width, blocks = 16 * 2**stage, []
            for index in range(blocks_a_stage):
                stride = 2 if stage > 0 and index == 0 else 1
                outputs = width * PreActBottleneck.expansion
                downsample = conv1x1(inputs, outputs, stride) if residual and inputs != outputs else None
                blocks.append(PreActBottleneck(inputs, width, stride, downsample, residual))
                inputs = outputs
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.bn = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, num_classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, 3, H, W]."""
        x = self.conv1(x)
        x = run_blocks([*self.layer1, *self.layer2, *self.layer3], x, self.checkpoint_every)
        return self.fc(self.avgpool(self.relu(self.bn(x))).flatten(1))


def preact_resnet(depth: int, num_classes: int = 10, residual: bool = True, checkpoint_every: int = 0) -> PreActResNet:
    """Pre-activation bottleneck network of He et al. 2016."""
    return PreActResNet(depth, num_classes, residual, checkpoint_every)
