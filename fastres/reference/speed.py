"""A small residual network for the least time to a good accuracy on 32x32 images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastres.reference.checkpointing import run_blocks
from fastres.reference.resnet import BasicBlock, conv1x1, init_weights


class WhiteningConv(nn.Conv2d):
    """4x4 convolution with stride 2 from pixels, whose filters can be fixed to ones that whiten patches.

    [N, 3, H, W] to [N, outputs, H/2, W/2]; half the filters are the negatives of the others.
    """

    def __init__(self, outputs: int):
        super().__init__(3, outputs, 4, stride=2, padding=1)
        nn.init.zeros_(self.bias)


class SpeedResNet(nn.Module):
    """Whitening convolution, ReLU, stages of basic blocks, global average pool, linear.

    Args:
        num_classes: logits [N, num_classes].
        widths: channels of each stage; every stage but the first halves the image.
        depths: basic blocks of each stage.
        stem: filters of the first layer.
        checkpoint_every: see `run_blocks`.
    """

    def __init__(
        self,
        num_classes: int = 10,
        widths: tuple[int, ...] = (64, 128, 256),
        depths: tuple[int, ...] = (1, 1, 1),
        stem: int = 64,
        checkpoint_every: int = 0,
    ):
        super().__init__()
        self.conv1 = WhiteningConv(stem)
        self.relu = nn.ReLU(inplace=True)
        self.stages, self.checkpoint_every = len(widths), checkpoint_every
        inputs = stem
        for stage, (width, depth) in enumerate(zip(widths, depths)):
            blocks = []
            for index in range(depth):
                stride, downsample = 2 if stage > 0 and index == 0 else 1, None
                if stride != 1 or inputs != width:
                    downsample = nn.Sequential(conv1x1(inputs, width, stride), nn.BatchNorm2d(width))
                blocks.append(BasicBlock(inputs, width, stride, downsample))
                inputs = width
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, num_classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, 3, H, W]."""
        x = self.relu(self.conv1(x))
        blocks = [block for stage in range(self.stages) for block in getattr(self, f"layer{stage + 1}")]
        x = run_blocks(blocks, x, self.checkpoint_every)
        return self.fc(torch.flatten(self.avgpool(x), 1))


def speed(num_classes: int = 10, checkpoint_every: int = 0) -> SpeedResNet:
    """Three basic blocks behind a whitening first layer that halves the image: least time to accuracy."""
    return SpeedResNet(num_classes, checkpoint_every=checkpoint_every)
