"""The CIFAR networks of He et al. 2015, section 4.2: 6n + 2 layers, 16, 32 and 64 channels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastres.checkpointing import run_blocks
from fastres.reference.resnet import BasicBlock, conv3x3, init_weights


class PaddedShortcut(nn.Module):
    """Option A: every ``stride``-th pixel, and zeros for the channels that the block adds; no parameters."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.added, self.stride = outputs - inputs, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added))


class CifarResNet(nn.Module):
    """3x3 stem, three stages of n basic blocks, global average pool, linear.

    Args:
        depth: 6n + 2 layers.
        num_classes: logits [N, num_classes].
        width: channels of the first stage; the others have two and four times as many.
        residual: without it, the plain twin of the paper's figure 6: as many parameters, no shortcut.
        checkpoint_every: see `run_blocks`.

    Raises:
        ValueError: for a depth that is not 6n + 2.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(
        self,
        depth: int,
        num_classes: int = 10,
        width: int = 16,
        residual: bool = True,
        checkpoint_every: int = 0,
    ):
        super().__init__()
        blocks_a_stage, rest = divmod(depth - 2, 6)
        if rest or blocks_a_stage < 1:
            raise ValueError(f"depth {depth} is not 6n + 2: take 8, 14, 20, ...")
        self.conv1 = conv3x3(3, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.checkpoint_every = checkpoint_every
        inputs = width
        for stage in range(3):
            outputs, blocks = width * 2**stage, []
            for index in range(blocks_a_stage):
                stride = 2 if stage > 0 and index == 0 else 1
                downsample = PaddedShortcut(inputs, outputs, stride) if residual and inputs != outputs else None
                blocks.append(BasicBlock(inputs, outputs, stride, downsample, residual))
                inputs = outputs
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, num_classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, 3, H, W]."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = run_blocks([*self.layer1, *self.layer2, *self.layer3], x, self.checkpoint_every)
        return self.fc(self.avgpool(x).flatten(1))


def cifar_resnet(
    depth: int, num_classes: int = 10, width: int = 16, residual: bool = True, checkpoint_every: int = 0
) -> CifarResNet:
    """CIFAR network of He et al. 2015, section 4.2, parameter-free shortcuts."""
    return CifarResNet(depth, num_classes, width, residual, checkpoint_every)
