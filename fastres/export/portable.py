"""A folded network in PyTorch's own operations, so that its program runs where fastres is not installed."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastres.nn import fold
from fastres.nn.fold import FoldedConv, FoldedPool, FoldedPreActBottleneck
from fastres.ops.plain import activated


def portable(model: nn.Module) -> nn.Module:
    """A copy for inference, folded (see `fastres.nn.fold`) and made of PyTorch's own operations, [N, 3, H, W] to
    logits.

    Args:
        model: eager, fused or folded.

    Raises:
        ValueError: see `fastres.nn.fold`.
    """
    folded = any(isinstance(module, FoldedConv) for module in model.modules())
    model = copy.deepcopy(model) if folded else fold(model)
    for module in model.modules():
        module.__class__ = _PLAIN.get(type(module), type(module))
    return model.to(  # type: ignore[call-overload]
        memory_format=torch.contiguous_format
    )  # of channels-last weights, torch.export.save warns


class FromPixels(nn.Module):
    """A network that takes images as they are stored: the normalisation of its training is part of it.

    Args:
        model: takes normalised images [N, 3, H, W].
        mean, std: per channel, on the scale 0..255.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.model = model
        device = next(model.parameters()).device
        for name, values in (("scale", [1 / s for s in std]), ("shift", [-m / s for m, s in zip(mean, std)])):
            self.register_buffer(name, torch.tensor(values, device=device).view(-1, 1, 1))
        self.training = model.training

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, classes] of RGB images [N, 3, H, W] on the scale 0..255, of any dtype."""
        return self.model(images.float() * self.scale + self.shift)


class _PlainConv(FoldedConv):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.plain(x, residual)


class _PlainPreActBottleneck(FoldedPreActBottleneck):
    def enter(self, x: Tensor) -> Tensor:
        return activated(self.bn(x), self.act)


class _PlainPool(FoldedPool):
    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x)


_PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    FoldedConv: _PlainConv,
    FoldedPool: _PlainPool,
    FoldedPreActBottleneck: _PlainPreActBottleneck,
}
