"""LAMB: Adam's direction at a length that each layer's own weights give (You et al. 2020, "Large Batch Optimization for
Deep Learning: Training BERT in 76 minutes", algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class LAMB(torch.optim.Optimizer):
    """``w -= lr * |w| / |u| * u`` with ``u = m / (sqrt(v) + eps) + weight_decay * w``, m and v Adam's corrected
    averages.

    Groups without weight decay, vectors such as biases and BatchNorm's, are moved by ``lr * u``, as the paper's own
    code does. Nothing is read by the host, and the learning rate may be a tensor on the device: a CUDA graph can hold a
    step. ``taken`` counts the calls of `step` in this process.
    """

    taken = 0

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ):
        # capturable: the counts of steps stay on the parameters' device when a state is loaded
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, capturable=True))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        self.taken += 1
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if weights:
                self._move(weights, group)
        return loss

    def _move(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        (beta1, beta2), decay = group["betas"], group["weight_decay"]
        grads = [p.grad for p in weights if p.grad is not None]
        states = [self._state_of(p) for p in weights]
        means, squares, steps = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step"))
        torch._foreach_add_(steps, 1)
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, value=1 - beta2)

        roots = torch._foreach_sqrt(torch._foreach_div(squares, _corrections(beta2, steps)))
        torch._foreach_add_(roots, group["eps"])
        moves = torch._foreach_div(torch._foreach_div(means, _corrections(beta1, steps)), roots)
        if decay:
            torch._foreach_add_(moves, weights, alpha=decay)
            lengths, strides = torch._foreach_norm(weights), torch._foreach_norm(moves)
            ratios = [
                torch.where((length > 0) & (stride > 0), length / stride, torch.ones_like(length))
                for length, stride in zip(lengths, strides)
            ]
            torch._foreach_mul_(moves, ratios)
        torch._foreach_mul_(moves, group["lr"])
        torch._foreach_sub_(weights, moves)

    def _state_of(self, p: Tensor) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return state


def _corrections(beta: float, steps: list[Tensor]) -> tuple[Tensor, ...]:
    """``1 - beta ** step`` of each count."""
    powers = torch._foreach_pow(beta, steps)
    return torch._foreach_add(torch._foreach_neg(powers), 1)
