"""Muon for convolution kernels: momentum whose update is orthogonalised (Jordan et al. 2024).

PyTorch's own ``torch.optim.Muon`` takes matrices only and a learning rate on the host. So each kernel [O, I, h, w] has
a matrix [O, I*h*w] of zeros, which Muon moves at rate 1; the kernel is moved by that at the rate of the present step,
which may be a tensor on the device. On a GPU its arithmetic is done here, for all kernels at once: one by one they are
hundreds of small launches, by the machine model a third of a step of the presets for speed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastres.train.optimizer_state import load_state
from fastres.train.orthogonal import orthogonalised

if TYPE_CHECKING:  # which imports this module
    from fastres.train.optimizer import SGDW


def hidden_kernels(model: nn.Module) -> list[Tensor]:
    """The trainable convolution kernels of a network but the first one, which sees pixels and not features."""
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    return [conv.weight for conv in convs[1:] if conv.weight.requires_grad and conv.groups == 1]


def as_matrix(kernel: Tensor, channels_last: bool) -> Tensor:
    """[O, I, h, w] as [O, I*h*w], or of channels_last memory as [O, h*w*I]: a view, in that memory."""
    return (kernel.permute(0, 2, 3, 1) if channels_last else kernel).flatten(1)


def as_kernel(matrix: Tensor, like: Tensor, channels_last: bool) -> Tensor:
    """The inverse of `as_matrix`: a view like the kernel [O, I, h, w]."""
    outputs, inputs, height, width = like.shape
    if channels_last:
        return matrix.view(outputs, height, width, inputs).permute(0, 3, 1, 2)
    return matrix.view(like.shape)


class MuonBesideSGD:
    """Muon on the kernels and SGD on the rest, to a training loop one optimizer.

    Args:
        sgd: of the other parameters; counts its steps as `fastres.train.optimizer.SGDW` does.
        kernels: [O, I, h, w].
        lr: peak learning rate of Muon.
        momentum, weight_decay: of Muon; the decay is decoupled, ``1 - lr * weight_decay``.
        lr_on: keep the learning rate as a tensor on this device, for a CUDA graph; None: as a number.
    """

    def __init__(
        self,
        sgd: SGDW,
        kernels: list[Tensor],
        lr: float,
        momentum: float,
        weight_decay: float,
        lr_on: torch.device | None = None,
    ):
        self.sgd, self.kernels, self.decay = sgd, kernels, weight_decay
        self._channels_last = [not kernel.is_contiguous() for kernel in kernels]
        self._moves = [nn.Parameter(torch.zeros_like(kernel.detach().flatten(1))) for kernel in kernels]
        self.muon = torch.optim.Muon(self._moves, lr=1.0, momentum=momentum, weight_decay=0.0)
        self._at_once = lr_on is not None or any(kernel.is_cuda for kernel in kernels)
        rate = lr if lr_on is None else torch.tensor(lr, dtype=torch.float32, device=lr_on)
        self._kernel_group: dict[str, Any] = {"params": kernels, "peak": lr, "lr": rate}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """SGD's groups and one of the kernels, with their learning rates."""
        return [*self.sgd.param_groups, self._kernel_group]

    @property
    def taken(self) -> int:
        """Calls of `step` in this process."""
        return self.sgd.taken

    @torch.no_grad()
    def step(self) -> None:
        """One step of both."""
        self.sgd.step()
        kernels: list[Tensor] = []
        moves: list[Tensor] = []
        views: list[Tensor] = []
        for kernel, move, last in zip(self.kernels, self._moves, self._channels_last):
            move.grad = None if kernel.grad is None else as_matrix(kernel.grad, last)
            if move.grad is not None:
                kernels.append(kernel)
                moves.append(move)
                views.append(as_kernel(move, kernel, last))
        if not kernels:
            return
        if self._at_once:
            self._move(moves)
        else:
            torch._foreach_zero_(moves)
            self.muon.step()
        lr = self._kernel_group["lr"]
        if self.decay:
            torch._foreach_mul_(kernels, 1 - lr * self.decay)
        torch._foreach_mul_(moves, lr)
        torch._foreach_add_(kernels, views)

    def _move(self, moves: list[Tensor]) -> None:
        """What ``torch.optim.Muon`` would make of the moves, were they zeros; but sums may be in another order."""
        momentum = self.muon.param_groups[0]["momentum"]
        grads = [move.grad for move in moves if move.grad is not None]  # there are all
        for move, grad in zip(moves, grads, strict=True):
            if not self.muon.state[move]:
                self.muon.state[move]["momentum_buffer"] = torch.zeros_like(grad)
        buffers = [self.muon.state[move]["momentum_buffer"] for move in moves]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        made = orthogonalised(torch._foreach_lerp(grads, buffers, momentum))
        torch._foreach_copy_(moves, made)
        torch._foreach_mul_(moves, [-math.sqrt(max(1, move.shape[0] / move.shape[1])) for move in moves])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget every gradient."""
        self.sgd.zero_grad(set_to_none)
        for parameter in (*self.kernels, *self._moves):
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The states of both."""
        return {"sgd": self.sgd.state_dict(), "muon": self.muon.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved `state_dict`.

        Raises:
            ValueError: where it is of another optimizer or other parameters.
        """
        if state.keys() != {"sgd", "muon"}:
            raise ValueError("no state of Muon")
        load_state(self.sgd, state["sgd"])
        self.muon.load_state_dict(state["muon"])
        self.muon.param_groups[0].update(lr=1.0, weight_decay=0.0)  # others in a state that an earlier version saved
