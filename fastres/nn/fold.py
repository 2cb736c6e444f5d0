"""Networks for inference: BatchNorm folded into the convolutions, shortcut and ReLU in their epilogues."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models import resnet as torchvision_resnet

from fastres.nn.blocks import conv_numbers, is_projection
from fastres.nn.fuse import unfuse
from fastres.nn.norm import conv_of, norm_of, to_nchw, to_nhwc, unsupported
from fastres.ops import bn_relu, conv_bias_act, conv_bias_act_again
from fastres.ops.cpu import PackedConv
from fastres.reference import cifar, notebook, preact
from fastres.reference.resnet import BasicBlock, Bottleneck, ResNet
from fastres.reference.speed import Widen, WidenAndHalve

_RESIDUAL_BLOCKS = (
    BasicBlock,
    Bottleneck,
    notebook.NotebookBlock,
    torchvision_resnet.BasicBlock,
    torchvision_resnet.Bottleneck,
)
# Modules whose conv1, bn1 and relu follow one another, whatever else they have.
_FIRST_LAYERS = (
    ResNet,
    cifar.CifarResNet,
    notebook.NotebookResNet,
    torchvision_resnet.ResNet,
    Widen,
    WidenAndHalve,
)


class _Inference(nn.Module):
    def train(self, mode: bool = True) -> nn.Module:
        """Raises RuntimeError for ``mode`` True: there is no BatchNorm left to train."""
        if mode:
            raise RuntimeError("a folded network is for inference only: train the network that it was folded from")
        return super().train(mode)


class FoldedConv(_Inference):
    """``relu(conv(x) + bias (+ residual))`` of a convolution and the BatchNorm behind it.

    Args:
        conv: the convolution.
        bn: with running statistics; None: bias 0.
        relu: whether ReLU follows.

    Raises:
        ValueError: for a convolution that the fused operations do not know, or a BatchNorm without running statistics.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d | None, relu: bool):
        super().__init__()
        if reason := unsupported(conv, bn):
            raise ValueError(f"cannot fold: {reason}")
        weight = conv.weight.detach()
        if bn is None:
            bias = torch.zeros(len(weight), device=weight.device)
        else:
            if bn.running_mean is None:
                raise ValueError("cannot fold a BatchNorm without running statistics")
            scale = torch.rsqrt(bn.running_var.double() + bn.eps)
            scale = scale if bn.weight is None else scale * bn.weight.detach()
            bias = -bn.running_mean * scale
            bias = bias if bn.bias is None else bias + bn.bias.detach()
            weight = weight * scale[:, None, None, None]
        self.geometry = copy.deepcopy(conv)
        self.geometry.register_parameter("weight", None)
        dtype = conv.weight.dtype
        self.register_buffer("weight", weight.to(dtype).contiguous(memory_format=torch.channels_last))
        self.register_buffer("bias", bias.to(torch.promote_types(dtype, torch.float32)))
        self.relu = relu
        self.packed = PackedConv()
        self.training = False

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [N, C, H, W] and residual [N, C', H', W'] to channels-last [N, C', H', W']."""
        y = conv_bias_act_again(x, self.weight, self.bias, residual, self.relu, self.packed)
        if y is not None:
            return y
        nhwc = to_nhwc(x)
        conv = conv_of(self.geometry, tuple(nhwc.shape[1:3]))._replace(weight=self.weight)
        added = None if residual is None else to_nhwc(residual)
        return to_nchw(conv_bias_act(nhwc, conv, self.bias, added, self.relu, self.packed))


class FoldedBlock(_Inference):
    """A residual block of folded convolutions; the last one adds the shortcut."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.convs = nn.ModuleList(
            FoldedConv(getattr(block, f"conv{i}"), getattr(block, f"bn{i}"), relu=True) for i in conv_numbers(block)
        )
        self.residual = getattr(block, "residual", True)
        shortcut = block.downsample
        if shortcut is not None and is_projection(shortcut):
            shortcut = FoldedConv(*shortcut, relu=False)
        self.downsample = shortcut
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to channels-last [N, C', H', W']."""
        y = _in_order(self.convs[:-1], x)
        if not self.residual:
            return self.convs[-1](y)
        return self.convs[-1](y, x if self.downsample is None else self.downsample(x))


class FoldedPreActBottleneck(_Inference):
    """A pre-activation bottleneck: the BatchNorm in front stays a pass of its own, the others are folded."""

    def __init__(self, block: preact.PreActBottleneck):
        super().__init__()
        self.bn = block.bn1
        self.convs = nn.ModuleList(
            [
                FoldedConv(block.conv1, block.bn2, relu=True),
                FoldedConv(block.conv2, block.bn3, relu=True),
                FoldedConv(block.conv3, None, relu=False),
            ]
        )
        self.residual = block.residual
        self.downsample = None if block.downsample is None else FoldedConv(block.downsample, None, relu=False)
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to channels-last [N, C', H', W']."""
        a = self.enter(x)
        y = _in_order(self.convs[:-1], a)
        if not self.residual:
            return self.convs[-1](y)
        return self.convs[-1](y, x if self.downsample is None else self.downsample(a))

    def enter(self, x: Tensor) -> Tensor:
        """``relu(bn(x))``, as the operation that is fused."""
        return to_nchw(bn_relu(to_nhwc(x), norm_of(self.bn))[0])


def fold(model: nn.Module) -> nn.Module:
    """A copy for inference, BatchNorms folded into the convolutions; its state_dict has names of its own.

    Args:
        model: a torchvision or `fastres.reference` ResNet, fused or eager.

    Raises:
        ValueError: where there is nothing to fold, or something that cannot be.
    """
    model = unfuse(copy.deepcopy(model)).eval().requires_grad_(False)
    holder = nn.Module()
    holder.model = model  # so that a block given alone has a parent too
    found = 0
    for parent in list(holder.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in _RESIDUAL_BLOCKS:
                setattr(parent, name, FoldedBlock(child))
            elif type(child) is preact.PreActBottleneck:
                setattr(parent, name, FoldedPreActBottleneck(child))
            elif type(child) in _FIRST_LAYERS:
                child.conv1 = FoldedConv(child.conv1, child.bn1, relu=True)
                child.bn1 = child.relu = nn.Identity()
            else:
                continue
            found += 1
    if not found:
        raise ValueError(
            f"{type(model).__name__} has nothing to fold: fold takes torchvision's and fastres.reference's ResNets"
        )
    return holder.model.eval()


def _in_order(convs: Sequence[nn.Module], x: Tensor) -> Tensor:
    for conv in convs:
        x = conv(x)
    return x
