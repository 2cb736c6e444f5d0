"""From an eager network to the fused one, in place."""

from __future__ import annotations

import warnings

import torch
import torchvision
from torch import nn

from fastres.nn import blocks, networks, stem
from fastres.nn.norm import unsupported
from fastres.ops.residual import KEEP
from fastres.reference import cifar, notebook, preact
from fastres.reference.resnet import BasicBlock, Bottleneck, ResNet
from fastres.reference.speed import SpeedResNet, WhiteningConv, Widen, WidenAndHalve

_BLOCKS: dict[type[nn.Module], type[nn.Module]] = {
    BasicBlock: blocks.BasicBlock,
    Bottleneck: blocks.Bottleneck,
    notebook.NotebookBlock: blocks.NotebookBlock,
    preact.PreActBottleneck: blocks.PreActBottleneck,
    Widen: blocks.Widen,
    WidenAndHalve: stem.WidenAndHalve,
    torchvision.models.resnet.BasicBlock: blocks.TorchvisionBasicBlock,
    torchvision.models.resnet.Bottleneck: blocks.TorchvisionBottleneck,
}
_NETWORKS: dict[type[nn.Module], type[nn.Module]] = {
    ResNet: networks.ResNet,
    cifar.CifarResNet: networks.CifarResNet,
    notebook.NotebookResNet: networks.NotebookResNet,
    preact.PreActResNet: networks.PreActResNet,
    SpeedResNet: networks.SpeedResNet,
    torchvision.models.ResNet: networks.TorchvisionResNet,
}
_EAGER = {fused: eager for eager, fused in (_BLOCKS | _NETWORKS).items()}


def fuse(model: nn.Module, keep: str = "all") -> nn.Module:
    """Give the residual blocks, stem and head of a network their fused forward, in place.

    Every module, Parameter and buffer stays the same object, so optimizers, EMA copies and hooks on the network, its
    stages and its blocks stay valid and ``state_dict`` keeps its names; only classes change, and convolution weights
    become channels-last. Convolutions and BatchNorms inside a fused block are no longer called: hooks on those do not
    run. Blocks whose configuration has no kernel (groups, dilation, biases, other norms or activations) stay eager,
    with a warning that says why.

    Args:
        model: a torchvision or `fastres.reference` ResNet, or any module that contains one or their blocks.
        keep: ``"all"``, or ``"fewer"`` to recompute each block's last convolution in backward and save its memory.

    Returns:
        The same ``model``.

    Raises:
        ValueError: where there is nothing to fuse.
    """
    if keep not in KEEP:
        raise ValueError(f"keep is {keep!r}: choose {' or '.join(KEEP)}")
    reasons = set()
    for module in model.modules():
        if type(module) in _BLOCKS:
            if reason := _block_reason(module):
                reasons.add(f"{type(module).__name__}: {reason}")
            else:
                _become(module, _BLOCKS[type(module)])
        if type(module) in _BLOCKS.values():
            module.keep = keep
    for module in model.modules():
        if type(module) in _NETWORKS and _network_is_fusable(module):
            _become(module, _NETWORKS[type(module)])
    if not any(type(module) in _EAGER for module in model.modules()):
        why = f" ({'; '.join(sorted(reasons))})" if reasons else ""
        raise ValueError(
            f"{type(model).__name__} has no block to fuse{why}: fuse takes torchvision's and fastres.reference's ResNets"
        )
    for reason in sorted(reasons):
        warnings.warn(f"left unfused: {reason}", stacklevel=2)
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Give a fused network its eager forward back, in place, and return it."""
    for module in model.modules():
        if type(module) in _EAGER:
            module.__class__ = _EAGER[type(module)]
            module.__dict__.pop("keep", None)
    return model


def _become(module: nn.Module, fused: type[nn.Module]) -> None:
    module.__class__ = fused
    module.to(memory_format=torch.channels_last)


def _block_reason(block: nn.Module) -> str | None:
    """Why the block must stay eager; None: it need not."""
    if not isinstance(block.relu, nn.ReLU):
        return f"{type(block.relu).__name__} is not nn.ReLU"
    pairs = [(getattr(block, f"conv{i}"), getattr(block, f"bn{i}")) for i in blocks.conv_numbers(block)]
    if isinstance(block, preact.PreActBottleneck) and block.downsample is not None:
        pairs.append((block.downsample, None))
    return next(filter(None, (unsupported(*pair) for pair in pairs)), None)


def _network_is_fusable(network: nn.Module) -> bool:
    """Whether stem and head are as in the original and, for pre-activation networks, every block is fused."""
    if not isinstance(network.relu, nn.ReLU) or not _is_global(network.avgpool):
        return False
    if isinstance(network, preact.PreActResNet):
        return all(type(block) is blocks.PreActBottleneck for block in networks.blocks_of(network))
    if isinstance(network, SpeedResNet):
        return type(network.conv1) is WhiteningConv
    return unsupported(network.conv1, network.bn1) is None


def _is_global(pool: nn.Module) -> bool:
    return type(pool) is nn.AdaptiveAvgPool2d and pool.output_size in (1, (1, 1))
