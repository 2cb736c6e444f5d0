"""A process of the test of data-parallel training; a module of its own, as spawned processes import it."""

from __future__ import annotations

import copy

import support_process
import torch
import torch.distributed as dist
from support_nets import assert_same, train_step, twins
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastres import ops

STEPS = 3
OPTIONS = ({}, {"gradient_as_bucket_view": True}, {"static_graph": True, "gradient_as_bucket_view": True})


def run(rank: int, ranks: int, meeting_file: str, names: list[str]) -> None:
    """Train eager and fused twins over all ranks, each on images of its own; they must stay the same."""
    support_process.begin()
    dist.init_process_group("gloo", init_method=f"file://{meeting_file}", rank=rank, world_size=ranks)
    try:
        with ops.implementation("aten"):
            for name in names:
                for options in OPTIONS:
                    compare(name, rank, options)
    finally:
        dist.destroy_process_group()


def compare(name: str, rank: int, options: dict[str, bool]) -> None:
    """Gradients, parameters and statistics of some steps, eager and fused."""
    torch.manual_seed(0)
    eager, fused = twins(name)
    alone = copy.deepcopy(fused)
    torch.manual_seed(1 + rank)
    images = [torch.randn(2, 3, 12, 11, dtype=torch.float64) for _ in range(STEPS)]
    with_ddp = [DistributedDataParallel(model, **options) for model in (eager, fused)]
    for step, x in enumerate(images):
        theirs, ours = (train_step(model, x) for model in with_ddp)
        assert_same(ours, theirs, 1e-9)
        if step == 0:
            grads = {n: g for n, g in train_step(alone, x).items() if n.startswith("grad")}
            assert not all(torch.equal(ours[n.replace("of ", "of module.")], g) for n, g in grads.items())
        for model in with_ddp:
            descend(model)
    assert_same_everywhere(fused)


@torch.no_grad()
def descend(model: nn.Module) -> None:
    """A step of gradient descent."""
    for parameter in model.parameters():
        parameter -= 0.01 * parameter.grad


def assert_same_everywhere(model: nn.Module) -> None:
    """Every rank holds rank 0's parameters."""
    for parameter in model.parameters():
        first = parameter.detach().clone()
        dist.broadcast(first, 0)
        assert torch.equal(parameter, first)
