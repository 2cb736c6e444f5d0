"""The order in which an epoch takes the training images."""

from __future__ import annotations

import torch
from torch import Tensor

SAMPLINGS = ("shuffle", "balanced")


def shuffled(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Every image once: int64 [N] for labels [N]."""
    return torch.randperm(len(labels), generator=generator)


def balanced(labels: Tensor, generator: torch.Generator) -> Tensor:
    """As many images in all, but of each class that has any the same number, give or take one: int64 [N] for labels
    int64 [N] on the CPU.

    An image of a class comes again only after all others of it.
    """
    present = labels.unique()
    share, rest = divmod(len(labels), len(present))
    more = torch.randperm(len(present), generator=generator) < rest  # classes with one image more
    of_class = labels.argsort(stable=True).split(labels.bincount()[present].tolist())
    picked = []
    for members, one_more in zip(of_class, more.tolist()):
        count = share + one_more
        rounds = -(-count // len(members))
        order = torch.cat([torch.randperm(len(members), generator=generator) for _ in range(rounds)])
        picked.append(members[order[:count]])
    together = torch.cat(picked)
    return together[torch.randperm(len(together), generator=generator)]
