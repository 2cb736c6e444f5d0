"""SGD with decoupled weight decay, kept off BatchNorm parameters and biases, alone or beside Muon."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastres.train.muon import MuonBesideSGD, hidden_kernels


class SGDW(torch.optim.SGD):
    """SGD whose weight decay shrinks the weights by ``1 - lr * decay`` apart from the momentum.

    Loshchilov & Hutter, "Decoupled Weight Decay Regularization", 2019, algorithm 1. A parameter group's
    ``decay`` is its decoupled coefficient, its ``weight_decay`` PyTorch's own coupled one. ``taken`` counts the calls
    of `step` in this process.
    """

    taken = 0

    @torch.no_grad()
    def step(self, closure=None):
        """Decay, then the SGD step. An AMP gradient scaler skips both when a gradient overflowed."""
        self.taken += 1
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if group["decay"] and weights:
                torch._foreach_mul_(weights, 1 - group["lr"] * group["decay"])
        return super().step(closure)


def make_optimizer(
    model: nn.Module,
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    scaled: bool,
    *,
    decoupled: bool = True,
    bias_lr: float = 1.0,
    muon: dict[str, Any] | None = None,
    lr_on: torch.device | None = None,
) -> SGDW | MuonBesideSGD:
    """The optimizer of a network's trainable parameters, foreach or fused, at learning rate ``lr``.

    Args:
        weight_decay: decoupled: on matrices and kernels, none on vectors (BatchNorm and biases); else L2 on all.
        scaled: gradients come from an fp16 gradient scaler. It must then be able to skip `SGDW.step` whole,
            which PyTorch's fused step would not let it.
        decoupled: whether the decay is apart from the momentum.
        bias_lr: factor of the learning rate of every bias, those of BatchNorm too.
        muon: options of `MuonBesideSGD` for the kernels behind the first layer; None: SGD for all.
        lr_on: keep learning rates as tensors on this device, for a CUDA graph; None: as numbers.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    kernels = hidden_kernels(model) if muon else []
    taken = {id(p) for p in kernels}
    rest = [(name, p) for name, p in named if id(p) not in taken]
    is_bias = {name for name, p in rest if p.ndim <= 1 and name.rsplit(".", 1)[-1] == "bias"}
    parts = [
        ([p for _, p in rest if p.ndim > 1], lr, weight_decay),
        ([p for name, p in rest if p.ndim <= 1 and name not in is_bias], lr, 0.0),
        ([p for name, p in rest if name in is_bias], lr * bias_lr, 0.0),
    ]
    groups = [
        {
            "params": params,
            "peak": peak,
            "lr": peak if lr_on is None else torch.tensor(peak, dtype=torch.float32, device=lr_on),
            "decay": decay if decoupled else 0.0,
            "weight_decay": 0.0 if decoupled else weight_decay,
        }
        for params, peak, decay in parts
        if params
    ]
    kind = {"foreach": True} if scaled else {"fused": True}
    sgd = SGDW(groups, lr=lr, momentum=momentum, nesterov=nesterov, **kind)
    return MuonBesideSGD(sgd, kernels, **muon, lr_on=lr_on) if muon and kernels else sgd


def set_lr(optimizer: SGDW | MuonBesideSGD, factor: float) -> None:
    """Give every parameter group ``factor`` times its peak learning rate, without waiting for its device."""
    for group in optimizer.param_groups:
        lr = group["peak"] * factor
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
