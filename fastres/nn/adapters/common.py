"""What adapters share."""

from __future__ import annotations

from torch import nn


def numbered_layers(block: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """``conv1`` with ``bn1``, and so on, as far as the block has them."""
    return [(getattr(block, f"conv{i}"), getattr(block, f"bn{i}")) for i in (1, 2, 3) if hasattr(block, f"conv{i}")]
