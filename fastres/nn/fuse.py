"""From an eager network to the fused one, in place, and back."""

from __future__ import annotations

import logging

from torch import nn

from fastres.nn import adapters  # noqa: F401  what is known of blocks and networks
from fastres.nn.blocks import FusedBlock
from fastres.nn.bypass import logger, said_before
from fastres.nn.classes import become_fused, unfused_class
from fastres.nn.report import fusable_modules, survey


def fuse(model: nn.Module, recompute: bool = False, strict: bool = False) -> nn.Module:
    """Give the residual blocks, stem and head of a network their fused forward, in place.

    Every module, Parameter and buffer stays the same object, so optimizers, EMA copies and hooks stay valid and
    ``state_dict`` keeps its names; only classes change. Fused convolutions, BatchNorms, activations and pools are not
    called. Where one of them must be, for it has hooks, a forward of its own, or a type or setting without a kernel
    (groups, biases, other norms or activations), that block, stem or head runs its eager forward. That is decided at
    each forward, so it holds for what is changed afterwards too.

    As for eager PyTorch, channels-last weights are the fastest: ``model.to(memory_format=torch.channels_last)``. Others
    are copied at every forward.

    What was fused, what was not and why is logged in a line (logger ``fastres``); `fastres.nn.report` tells it again.

    Args:
        model: a torchvision or `fastres.reference` ResNet, or any module that contains one, their blocks, blocks of a
            registered class (see `fastres.nn.register_block`) or convolution, BatchNorm and ReLU in an
            ``nn.Sequential``.
        recompute: compute each block's last convolution again in backward, which saves the memory of its output.
        strict: raise where anything is left eager, and change nothing.

    Returns:
        The same ``model``.

    Raises:
        ValueError: where there is nothing to fuse, or with ``strict`` something is left.
    """
    found = survey(model, planned=True)
    if not found.found:
        why = f" ({found.reasons()})" if found.left else ""
        raise ValueError(
            f"{found.name} has no block to fuse{why}: fuse takes torchvision's and fastres.reference's ResNets, and "
            "what fastres.nn.register_block knows"
        )
    if strict and found.left:
        raise ValueError(f"{found}; with strict=True nothing may be left")
    for module in list(fusable_modules(model)):
        become_fused(module)
    reasons = [reason for text in found.left.values() for reason in text.split("; ")]
    for module in model.modules():
        if isinstance(module, FusedBlock):
            module.recompute = recompute
        said_before(module, reasons)
    logger.log(logging.WARNING if found.left else logging.INFO, "%s", found)
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Give a fused network its eager forward back, in place, and return it.

    Also inside wrappers (DataParallel, DistributedDataParallel, compiled and sharded modules), and under classes that
    others put on top of the fused ones.
    """
    for module in model.modules():
        eager = unfused_class(type(module))
        if eager is not type(module):
            module.__class__ = eager
            module.__dict__.pop("recompute", None)
    return model
