"""The networks of `fastres.reference` and torchvision with a fused stem and head; `fastres.nn.fuse` makes them."""

from __future__ import annotations

import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from fastres.nn.blocks import has_hooks, in_chains
from fastres.nn.norm import norm_of, to_nhwc, track
from fastres.nn.stem import fused_conv_relu, fused_stem
from fastres.ops import bn_relu, global_avg_pool
from fastres.reference import cifar, notebook, preact
from fastres.reference.checkpointing import run_blocks
from fastres.reference.resnet import ResNet as EagerResNet
from fastres.reference.speed import SpeedResNet as EagerSpeedResNet


class _FusedNetwork(nn.Module):
    """Forward of a network of ``conv1``, ``bn1``, perhaps ``maxpool``, ``layer1``, ... and ``fc``."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, 3, H, W]."""
        x = fused_stem(x, self.conv1, self.bn1, getattr(self, "maxpool", None))
        x = self._stages(x)
        logits = self.fc(global_avg_pool(to_nhwc(x)))
        return F.relu(logits) if getattr(self, "relu_logits", False) else logits

    def _stages(self, x: Tensor) -> Tensor:
        return run_blocks(blocks_of(self), x, self.checkpoint_every, in_chains)


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The blocks of ``layer1``, ``layer2``, ... in order."""
    stages = [getattr(network, f"layer{i}") for i in range(1, 5) if hasattr(network, f"layer{i}")]
    return [block for stage in stages for block in stage]


class ResNet(_FusedNetwork, EagerResNet):
    """`fastres.reference.resnet.ResNet`, fused."""


class CifarResNet(_FusedNetwork, cifar.CifarResNet):
    """`fastres.reference.cifar.CifarResNet`, fused."""


class NotebookResNet(_FusedNetwork, notebook.NotebookResNet):
    """`fastres.reference.notebook.NotebookResNet`, fused."""


class TorchvisionResNet(_FusedNetwork, torchvision.models.ResNet):
    """``torchvision.models.ResNet``, fused; stages that have hooks are called."""

    def _stages(self, x: Tensor) -> Tensor:
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            plain = type(stage) is nn.Sequential and not has_hooks(stage)
            x = in_chains(stage, x) if plain else stage(x)
        return x


class PreActResNet(preact.PreActResNet):
    """`fastres.reference.preact.PreActResNet`, fused: each block hands the statistics of its result to the next."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, 3, H, W]."""
        x, coef = run_blocks(blocks_of(self), (self.conv1(x), None), self.checkpoint_every)
        x, statistics = bn_relu(to_nhwc(x), norm_of(self.bn), coef)
        track([self.bn], [statistics])
        return self.fc(global_avg_pool(x))


class SpeedResNet(EagerSpeedResNet):
    """`fastres.reference.speed.SpeedResNet`, fused."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, 3, H, W]."""
        x = fused_conv_relu(x, self.conv1)
        x = run_blocks(self.blocks(), x, self.checkpoint_every, in_chains)
        return self.fc(global_avg_pool(to_nhwc(x)))
