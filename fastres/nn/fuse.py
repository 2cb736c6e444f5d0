"""From an eager network to the fused one, in place, and back."""

from __future__ import annotations

import gc
import logging

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastres.nn import adapters  # noqa: F401  what is known of blocks and networks
from fastres.nn.blocks import FusedBlock
from fastres.nn.bypass import logger, said_before
from fastres.nn.classes import become_fused, unfused_class
from fastres.nn.report import fusable_modules, survey
from fastres.ops.residual import KEEP


def fuse(model: nn.Module, keep: str = "all", strict: bool = False, channels_last: bool = True) -> nn.Module:
    """Give the residual blocks, stem and head of a network their fused forward, in place.

    Every module, Parameter and buffer stays the same object, so optimizers, EMA copies and hooks stay valid and
    ``state_dict`` keeps its names; only classes change, and convolution weights become channels-last. Fused convolutions,
    BatchNorms, activations and pools are not called. Where one of them must be, for it has hooks, a forward of its own, or
    a type or setting without a kernel (groups, biases, other norms or activations), that block, stem or head
    runs its eager forward. That is decided at each forward, so it holds for what is changed afterwards too.

    What was fused, what was not and why is logged in a line (logger ``fastres``); `fastres.nn.report` tells it again.

    Args:
        model: a torchvision or `fastres.reference` ResNet, or any module that contains one, their blocks, blocks of a
            registered class (see `fastres.nn.register_block`) or convolution, BatchNorm and ReLU in an ``nn.Sequential``.
        keep: ``"all"``, or ``"fewer"`` to recompute each block's last convolution in backward and save its memory.
        strict: raise where anything is left eager, and change nothing.
        channels_last: store the weights as the kernels read them. With False they stay as they are and are copied at every
            forward; for what takes no channels-last weights: ``torch.distributed.fsdp.fully_shard`` after `fuse` (before
            it there is no difference) and ``torch.nn.utils.prune``. They stay too where DistributedDataParallel wraps the
            model already, whose first gradients would be wrong.

    Returns:
        The same ``model``.

    Raises:
        ValueError: where there is nothing to fuse, or with ``strict`` something is left.
    """
    if keep not in KEEP:
        raise ValueError(f"keep is {keep!r}: choose {' or '.join(KEEP)}")
    found = survey(model, planned=True)
    if not found.found:
        why = f" ({found.reasons()})" if found.left else ""
        raise ValueError(
            f"{found.name} has no block to fuse{why}: fuse takes torchvision's and fastres.reference's ResNets, and what "
            "fastres.nn.register_block knows"
        )
    if strict and found.left:
        raise ValueError(f"{found}; with strict=True nothing may be left")
    channels_last = channels_last and not _is_data_parallel(model)
    for module in list(fusable_modules(model)):
        become_fused(module, channels_last)
    reasons = [reason for text in found.left.values() for reason in text.split("; ")]
    for module in model.modules():
        if isinstance(module, FusedBlock):
            module.keep = keep
        said_before(module, reasons)
    logger.log(logging.WARNING if found.left else logging.INFO, "%s", found)
    return model


def _is_data_parallel(model: nn.Module) -> bool:
    """Whether a DistributedDataParallel holds the model, or the model one: it has noted the strides of the parameters."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    wrappers = [one for one in gc.get_objects() if issubclass(type(one), DistributedDataParallel)]
    parameters = {id(parameter) for wrapper in wrappers for parameter in wrapper.parameters()}
    return any(id(parameter) in parameters for parameter in model.parameters())


def unfuse(model: nn.Module) -> nn.Module:
    """Give a fused network its eager forward back, in place, and return it.

    Also inside wrappers (DataParallel, DistributedDataParallel, compiled and sharded modules), and under classes that
    others put on top of the fused ones.
    """
    for module in model.modules():
        eager = unfused_class(type(module))
        if eager is not type(module):
            module.__class__ = eager
            module.__dict__.pop("keep", None)
    return model
