"""A small residual network for the least time to a good accuracy on 32x32 images.

Behind a first layer that already halves the image each stage widens by one convolution and refines by one basic block,
as in Page 2019, "How to train your ResNet"; most of its arithmetic is at 15x15 pixels or fewer.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from fastres.checkpointing import run_blocks
from fastres.reference.resnet import BasicBlock, conv3x3, init_weights


class WhiteningConv(nn.Conv2d):
    """Convolution with bias from pixels, whose filters can be fixed to ones that whiten patches.

    [N, 3, H, W] to [N, outputs, (H-patch)/stride+1, (W-patch)/stride+1]; half the filters are meant to be the negatives
    of the others.
    """

    def __init__(self, outputs: int, patch: int = 3, stride: int = 2):
        super().__init__(3, outputs, patch, stride)
        nn.init.zeros_(cast(Tensor, self.bias))


class Widen(nn.Module):
    """``relu(bn(conv(x)))`` with a 3x3 convolution.

    [N, inputs, H, W] to [N, outputs, H, W].
    """

    residual, downsample = False, None  # to what knows residual blocks: one without a shortcut

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv1 = conv3x3(inputs, outputs)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """See above."""
        return self.relu(self.bn1(self.conv1(x)))


class ResidualConv(nn.Module):
    """``relu(bn(conv(x)) + x)`` with a 3x3 convolution: the smallest residual block.

    [N, width, H, W] to the same.
    """

    residual, downsample = True, None  # its shortcut is the identity

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = conv3x3(width, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """See above."""
        return self.relu(self.bn1(self.conv1(x)) + x)


class HalvingPool(nn.MaxPool2d):
    """2x2 max-pool; an image one pixel high or wide is not halved."""

    def __init__(self):
        super().__init__(2)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, C, H/2, W/2]."""
        return x if min(x.shape[2:]) == 1 else super().forward(x)


class WidenAndHalve(Widen):
    """`Widen` and a `HalvingPool` behind it.

    [N, inputs, H, W] to [N, outputs, H/2, W/2].
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs)
        self.maxpool = HalvingPool()

    def forward(self, x: Tensor) -> Tensor:
        """See above."""
        return self.maxpool(super().forward(x))


class SmoothWiden(nn.Module):
    """``gelu(pool(bn(conv(x))))`` with a 3x3 convolution and a `HalvingPool`.

    [N, inputs, H, W] to [N, outputs, H/2, W/2]; without the pool to [N, outputs, H, W].
    """

    def __init__(self, inputs: int, outputs: int, halve: bool = True):
        super().__init__()
        self.conv1 = conv3x3(inputs, outputs)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.maxpool = HalvingPool() if halve else nn.Identity()
        self.gelu = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """See above."""
        return self.gelu(self.maxpool(self.bn1(self.conv1(x))))


class SmoothBlock(nn.Module):
    """``gelu(bn2(conv2(gelu(bn1(conv1(x))))) + x)`` with 3x3 convolutions: a basic block with GELU.

    [N, width, H, W] to the same.
    """

    residual, downsample = True, None  # its shortcut is the identity

    def __init__(self, width: int):
        super().__init__()
        self.conv1, self.conv2 = conv3x3(width, width), conv3x3(width, width)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.gelu = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """See above."""
        return self.gelu(self.bn2(self.conv2(self.gelu(self.bn1(self.conv1(x))))) + x)


class SpeedResNet(nn.Module):
    """Whitening convolution, ReLU, stages that widen and have a residual block, global average pool, linear.

    Args:
        num_classes: logits [N, num_classes].
        widths: channels of each stage; every stage halves the image, but the first one behind a stem that did.
        stem: filters of the first layer, half of them the others' negatives: 48 are 24 of the 27 directions of a 3x3
            patch of 3 channels, 24 are all 12 of a 2x2 patch.
        patch, stride: of the first layer.
        layers: 3x3 convolutions of each residual block: 1 or 2.
        act: ``relu``, or ``gelu``, with which residual blocks have two convolutions.
        checkpoint_every: see `run_blocks`.

    Raises:
        ValueError: for other blocks.
    """

    def __init__(
        self,
        num_classes: int = 10,
        widths: tuple[int, ...] = (32, 64, 128),
        stem: int = 48,
        patch: int = 3,
        stride: int = 2,
        layers: int = 2,
        act: str = "relu",
        checkpoint_every: int = 0,
    ):
        super().__init__()
        if (layers, act) not in ((1, "relu"), (2, "relu"), (2, "gelu")):
            raise ValueError(f"blocks of {layers} convolutions with {act!r}: take 1 or 2 with 'relu', or 2 with 'gelu'")
        self.conv1 = WhiteningConv(stem, patch, stride)
        self.act = nn.GELU() if act == "gelu" else nn.ReLU(inplace=True)
        self.checkpoint_every = checkpoint_every
        stages: list[nn.Module] = []
        for inputs, width in zip((stem, *widths), widths):
            halve = bool(stages) or stride == 1
            if act == "gelu":
                stages.append(nn.Sequential(SmoothWiden(inputs, width, halve), SmoothBlock(width)))
                continue
            widen = WidenAndHalve if halve else Widen
            block = ResidualConv(width) if layers == 1 else BasicBlock(width, width)
            stages.append(nn.Sequential(widen(inputs, width), block))
        self.stages = nn.ModuleList(stages)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[-1], num_classes)
        init_weights(self)

    def blocks(self) -> list[nn.Module]:
        """The layers of all stages in order."""
        return [layer for stage in self.stages for layer in stage.children()]

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, 3, H, W]."""
        x = self.act(self.conv1(x))
        x = run_blocks(self.blocks(), x, self.checkpoint_every)
        return self.fc(self.avgpool(x).flatten(1))


def speed(num_classes: int = 10, checkpoint_every: int = 0) -> SpeedResNet:
    """Three basic blocks of 32, 64 and 128 channels behind a whitening first layer: least time to accuracy."""
    return SpeedResNet(num_classes, checkpoint_every=checkpoint_every)


WIDE: dict[str, Any] = dict(
    stem=24, patch=2, stride=1, act="gelu"
)  # whitens at full resolution, as airbench's networks do


def speed94(num_classes: int = 10, checkpoint_every: int = 0) -> SpeedResNet:
    """Three basic blocks of 64, 128 and 256 channels behind 2x2 whitening: the preset `speed94`'s."""
    return SpeedResNet(num_classes, (64, 128, 256), **WIDE, checkpoint_every=checkpoint_every)


def speed95(num_classes: int = 10, checkpoint_every: int = 0) -> SpeedResNet:
    """The same with one and a half times its channels: the preset `speed95`'s."""
    return SpeedResNet(num_classes, (96, 192, 384), **WIDE, checkpoint_every=checkpoint_every)


def speed96(num_classes: int = 10, checkpoint_every: int = 0) -> SpeedResNet:
    """The same with twice its channels: the preset `speed96`'s."""
    return SpeedResNet(num_classes, (128, 256, 512), **WIDE, checkpoint_every=checkpoint_every)
