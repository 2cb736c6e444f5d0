"""ResNet-18 to 152 of He et al. 2015, "Deep Residual Learning for Image Recognition", table 1.

Submodule names, shapes and initial weights are torchvision's, so weights interchange. The bottleneck has its stride in
the 3x3 convolution ("v1.5"), as torchvision's has.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastres.checkpointing import run_blocks


def conv1x1(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """1x1 convolution without bias."""
    return nn.Conv2d(inputs, outputs, 1, stride, bias=False)


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """3x3 convolution without bias, padded by 1."""
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """``relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))`` with two 3x3 convolutions.

    Args:
        inputs: channels of x [N, inputs, H, W].
        width: channels of both convolutions and of the output [N, width, H/stride, W/stride].
        downsample: the shortcut where it is not the identity.
        residual: without it, the plain twin: no shortcut.
    """

    expansion = 1

    def __init__(
        self, inputs: int, width: int, stride: int = 1, downsample: nn.Module | None = None, residual: bool = True
    ):
        super().__init__()
        self.conv1 = conv3x3(inputs, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.residual:
            y = y + (x if self.downsample is None else self.downsample(x))
        return self.relu(y)


class Bottleneck(nn.Module):
    """``relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x))))))) + shortcut(x))``: 1x1, 3x3, 1x1 convolutions.

    Args:
        inputs: channels of x [N, inputs, H, W].
        width: channels of the 3x3 convolution; the output [N, 4*width, H/stride, W/stride] has four times as many.
        downsample, residual: see `BasicBlock`.
    """

    expansion = 4

    def __init__(
        self, inputs: int, width: int, stride: int = 1, downsample: nn.Module | None = None, residual: bool = True
    ):
        super().__init__()
        self.conv1 = conv1x1(inputs, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, width * self.expansion)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        if self.residual:
            y = y + (x if self.downsample is None else self.downsample(x))
        return self.relu(y)


def init_weights(model: nn.Module) -> None:
    """He et al. 2015, "Delving Deep into Rectifiers": normal weights with variance 2 / fan-out, as torchvision's."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class ResNet(nn.Module):
    """Stem, four stages of blocks, global average pool, linear.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        depths: blocks a stage; the stages' widths are 64, 128, 256, ...
        num_classes: logits [N, num_classes].
        stem: ``imagenet`` is a 7x7 stride-2 convolution and a 3x3 stride-2 max-pool, ``cifar`` a 3x3 stride-1
            convolution and no pool, ``halving`` the same with stride 2.
        zero_init_residual: start each block as its shortcut: gamma 0 in its last BatchNorm (Goyal et al. 2017).
        residual: without it, the plain twin.
        checkpoint_every: see `run_blocks`.

    Raises:
        ValueError: for an unknown stem.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, ...],
        num_classes: int = 10,
        stem: str = "imagenet",
        zero_init_residual: bool = False,
        residual: bool = True,
        checkpoint_every: int = 0,
    ):
        super().__init__()
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
            pool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1)
        elif stem in ("cifar", "halving"):
            self.conv1 = conv3x3(3, 64, stride=2 if stem == "halving" else 1)
            pool = nn.Identity()
        else:
            raise ValueError(f"stem {stem!r} is unknown: choose imagenet, cifar or halving")
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = pool
        self.stages, self.checkpoint_every = len(depths), checkpoint_every
        inputs = 64
        for stage, depth in enumerate(depths):
            width, blocks = 64 * 2**stage, []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                outputs, downsample = width * block.expansion, None
                if residual and (stride != 1 or inputs != outputs):
                    downsample = nn.Sequential(conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))
                blocks.append(block(inputs, width, stride, downsample, residual))
                inputs = outputs
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, num_classes)
        init_weights(self)
        if zero_init_residual:
            for module in self.modules():
                if isinstance(module, (BasicBlock, Bottleneck)):
                    last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
                    nn.init.zeros_(last.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, 3, H, W]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        blocks = [block for stage in range(self.stages) for block in getattr(self, f"layer{stage + 1}")]
        x = run_blocks(blocks, x, self.checkpoint_every)
        return self.fc(self.avgpool(x).flatten(1))


DEPTHS: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}


def resnet(
    depth: int,
    num_classes: int = 10,
    stem: str = "imagenet",
    zero_init_residual: bool = False,
    residual: bool = True,
    checkpoint_every: int = 0,
) -> ResNet:
    """ResNet-18 to 152 of He et al. 2015, weights interchange with torchvision's."""
    return ResNet(*DEPTHS[depth], num_classes, stem, zero_init_residual, residual, checkpoint_every)


def resnet8(num_classes: int = 10, residual: bool = True, checkpoint_every: int = 0) -> ResNet:
    """Three basic blocks of 64, 128 and 256 channels behind a stem that halves the image: small images, fast."""
    return ResNet(BasicBlock, (1, 1, 1), num_classes, "halving", residual=residual, checkpoint_every=checkpoint_every)
