"""Optimizers whose weight decay is decoupled and kept off BatchNorm parameters and biases: SGD, alone or beside Muon,
AdamW and LAMB.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastres.ops.cpu import sgd as one_pass
from fastres.train.lamb import LAMB
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
        if closure is None and self._in_one_pass():
            return None
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            for p in weights:  # PyTorch's fused step on a CPU pairs values by their places in memory
                if p.is_cpu and p.grad.layout == torch.strided and not one_pass.in_one_format([p, p.grad]):
                    p.grad = torch.empty_like(p, dtype=p.grad.dtype, requires_grad=False).copy_(p.grad)
            if group["decay"] and weights:
                torch._foreach_mul_(weights, 1 - group["lr"] * group["decay"])
        return super().step(closure)

    def _in_one_pass(self) -> bool:
        """The step on a CPU where the compiled one takes all parameters; False: nothing was done."""
        scaled = getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None
        if scaled or not all(map(_is_plain, self.param_groups)):
            return False
        steps = []
        for group in self.param_groups:
            pairs = [(p, grad) for p in group["params"] if (grad := p.grad) is not None]
            states = [self.state[p] for p, _ in pairs]
            buffers = [state.get("momentum_buffer") for state in states]
            steps.append((states, [p for p, _ in pairs], [grad for _, grad in pairs], buffers))
        if not all(one_pass.takes(*tensors) for _, *tensors in steps):
            return False
        for group, (states, params, grads, buffers) in zip(self.param_groups, steps):
            rates = one_pass.Rates(
                group["lr"], group["momentum"], group["nesterov"], group["decay"], group["weight_decay"]
            )
            for state, buffer in zip(states, one_pass.step(params, grads, buffers, rates)):
                if buffer is not None:
                    state["momentum_buffer"] = buffer
        return True


def _is_plain(group: dict[str, Any]) -> bool:
    """Whether a group of SGD on a CPU asks for nothing but momentum and weight decay, at a rate that is a number."""
    asks = group["dampening"] or group["maximize"] or group["differentiable"] or isinstance(group["lr"], Tensor)
    return not asks and all(p.is_cpu for p in group["params"])


class AdamW(torch.optim.AdamW):
    """PyTorch's own, which counts its steps as `SGDW` does."""

    taken = 0

    def step(self, closure=None):
        """As PyTorch's. An AMP gradient scaler skips it when a gradient overflowed."""
        self.taken += 1
        return super().step(closure)


Optimizer = SGDW | MuonBesideSGD | AdamW | LAMB


def make_optimizer(
    model: nn.Module,
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    scaled: bool,
    *,
    kind: str = "sgd",
    betas: tuple[float, float] = (0.9, 0.999),
    decoupled: bool = True,
    bias_lr: float = 1.0,
    layer_decay: float | None = None,
    depths: Mapping[int, int] | None = None,
    muon: dict[str, Any] | None = None,
    lr_on: torch.device | None = None,
) -> Optimizer:
    """The optimizer of a network's trainable parameters, foreach or fused, at learning rate ``lr``.

    Args:
        weight_decay: decoupled: on matrices and kernels, none on vectors (BatchNorm and biases); else L2 on all.
        scaled: gradients come from an fp16 gradient scaler. It must then be able to skip `SGDW.step` whole,
            which PyTorch's fused step would not let it.
        kind: ``sgd``, ``adamw`` or ``lamb``; momentum and nesterov are of the first, betas of the others.
        decoupled: whether the decay is apart from the momentum.
        bias_lr: factor of the learning rate of every bias, those of BatchNorm too.
        layer_decay: factor of the learning rate for each layer that lies behind a parameter's own (Howard & Ruder 2018,
            "Universal Language Model Fine-tuning", section 3.2, with its rate for layers as deep as it goes).
        depths: number of those layers by the parameter's id, see `fastres.train.layers.depths`.
        muon: options of `MuonBesideSGD` for the kernels behind the first layer; None: SGD for all.
        lr_on: keep learning rates as tensors on this device, for a CUDA graph; None: as numbers.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    kernels = hidden_kernels(model) if muon else []
    taken = {id(p) for p in kernels}
    rest = [(name, p) for name, p in named if id(p) not in taken]
    is_bias = {name for name, p in rest if p.ndim <= 1 and name.rsplit(".", 1)[-1] == "bias"}
    parts: dict[tuple[int, int], list[nn.Parameter]] = {}  # by layers behind it, and matrix, vector or bias
    for name, p in rest:
        behind = depths[id(p)] if layer_decay is not None and depths is not None else 0
        parts.setdefault((behind, 0 if p.ndim > 1 else 2 if name in is_bias else 1), []).append(p)
    groups = []
    for (behind, form), params in sorted(parts.items(), key=lambda part: part[0]):
        peak = lr * (bias_lr if form == 2 else 1.0) * (1.0 if layer_decay is None else layer_decay**behind)
        rate = peak if lr_on is None else torch.tensor(peak, dtype=torch.float32, device=lr_on)
        groups.append({"params": params, "peak": peak, "lr": rate, **_decay(kind, weight_decay, decoupled, form == 0)})
    way = {"foreach": True} if scaled else {"fused": True}
    if kind == "adamw":
        return AdamW(groups, lr=lr, betas=betas, capturable=lr_on is not None, **way)
    if kind == "lamb":
        return LAMB(groups, lr=lr, betas=betas)
    sgd = SGDW(groups, lr=lr, momentum=momentum, nesterov=nesterov, **way)
    return MuonBesideSGD(sgd, kernels, **muon, lr_on=lr_on) if muon and kernels else sgd


def _decay(kind: str, weight_decay: float, decoupled: bool, matrix: bool) -> dict[str, float]:
    """The entries of a parameter group that say its weight decay: ``decay`` is `SGDW`'s decoupled one."""
    if kind != "sgd":
        return {"weight_decay": weight_decay if matrix else 0.0}
    if decoupled:
        return {"decay": weight_decay if matrix else 0.0, "weight_decay": 0.0}
    return {"decay": 0.0, "weight_decay": weight_decay}


def set_lr(optimizer: Optimizer, factor: float) -> None:
    """Give every parameter group ``factor`` times its peak learning rate, without waiting for its device."""
    for group in optimizer.param_groups:
        lr = group["peak"] * factor
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
