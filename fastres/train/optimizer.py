"""SGD with decoupled weight decay, kept off BatchNorm parameters and biases."""

from __future__ import annotations

import torch
from torch import nn


class SGDW(torch.optim.SGD):
    """SGD whose weight decay shrinks the weights by ``1 - lr * weight_decay`` apart from the momentum.

    Loshchilov & Hutter, "Decoupled Weight Decay Regularization", 2019, algorithm 1. A parameter group's
    ``decay`` is its decoupled coefficient; PyTorch's own coupled ``weight_decay`` stays 0.
    """

    @torch.no_grad()
    def step(self, closure=None):
        """Decay, then the SGD step. An AMP gradient scaler skips both when a gradient overflowed."""
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if group["decay"] and weights:
                torch._foreach_mul_(weights, 1 - group["lr"] * group["decay"])
        return super().step(closure)


def make_optimizer(
    model: nn.Module, lr: float, momentum: float, nesterov: bool, weight_decay: float, scaled: bool
) -> SGDW:
    """The optimizer of a network: decay on matrices and kernels, none on vectors (BatchNorm and biases).

    Args:
        scaled: gradients come from an fp16 gradient scaler. It must then be able to skip `SGDW.step` whole,
            which PyTorch's fused step would not let it.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "decay": 0.0},
    ]
    kind = {"foreach": True} if scaled else {"fused": True}
    return SGDW([g for g in groups if g["params"]], lr=lr, momentum=momentum, nesterov=nesterov, **kind)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr
