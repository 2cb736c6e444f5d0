"""Random numbers that depend on a few integers alone (seed, epoch, step), so that a run can begin anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

ORDER, CHOICES, FIRST_FLIPS, VIEW, MIX = range(5)  # what a stream of random numbers is for


def seed_of(*key: int) -> int:
    """A hash of all integers of ``key``, below 2**63 (splitmix64, Steele et al. 2014)."""
    mask, state = (1 << 64) - 1, 0
    for value in key:
        state = (state + (value & mask) + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1


def stream(*key: int) -> torch.Generator:
    """A CPU generator whose seed is `seed_of` the key."""
    return torch.Generator().manual_seed(seed_of(*key))


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Context in which PyTorch's global random numbers of the CPU, which torchvision draws from, are those of a key."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(*key))
        yield
