"""Activation checkpointing over groups of blocks, without counting the recomputation in BatchNorm's statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def in_order(blocks: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Apply blocks one after the other."""
    for block in blocks:
        x = block(x)
    return x


def run_blocks(
    blocks: Sequence[nn.Module],
    x: Any,
    every: int = 0,
    apply: Callable[[Sequence[nn.Module], Any], Any] = in_order,
) -> Any:
    """Apply blocks in order; where ``every`` is not 0, keep only each ``every``-th activation for backward.

    The rest is computed again in backward (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"): one
    more forward of time, and memory for ``len(blocks) / every`` inputs and one group's activations.

    Args:
        x: [N, C, H, W], or what ``apply`` takes and returns.
        apply: applies a group of blocks.
    """
    if not every or not torch.is_grad_enabled():
        return apply(blocks, x)
    for first in range(0, len(blocks), every):
        group = blocks[first : first + every]
        x = checkpoint(
            apply,
            group,
            x,
            use_reentrant=False,
            preserve_rng_state=False,  # no block draws random numbers
            context_fn=partial(_contexts, group),
        )
    return x


def _contexts(blocks: Sequence[nn.Module]) -> tuple[AbstractContextManager, AbstractContextManager]:
    return nullcontext(), _statistics_kept(blocks)


@contextmanager
def _statistics_kept(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Lend each training BatchNorm copies of its running statistics and counter: what it adds to them is dropped.

    It must have some to update, as in the first forward: autograd expects the same tensors to be saved again.
    """
    norms = [m for block in blocks for m in block.modules() if isinstance(m, _BatchNorm) and m.training]
    own = [dict(norm._buffers) for norm in norms]
    for norm, buffers in zip(norms, own):
        norm._buffers.update({name: value.clone() for name, value in buffers.items() if value is not None})
    try:
        yield
    finally:
        for norm, buffers in zip(norms, own):
            norm._buffers.update(buffers)
