"""Fused networks by name: the reference's definition of each, with the fused forward."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastres.models.registry import create_model
from fastres.nn import fuse


def create_fused_model(name: str, num_classes: int = 10, recompute: bool = False, **options: Any) -> nn.Module:
    """`create_model`, fused.

    Args:
        recompute: see `fastres.nn.fuse`.
        name, num_classes, options: see `create_model`.

    Raises:
        FastresError: see `create_model`.
    """
    return fuse(create_model(name, num_classes, **options), recompute)
