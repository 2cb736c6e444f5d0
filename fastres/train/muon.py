"""Muon for convolution kernels: momentum whose update is orthogonalised (Jordan et al. 2024).

PyTorch's own ``torch.optim.Muon`` takes matrices only, so each kernel [O, I, h, w] is lent to it as the matrix
[O, I*h*w] in the same memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # which imports this module
    from fastres.train.optimizer import SGDW


def hidden_kernels(model: nn.Module) -> list[Tensor]:
    """The trainable convolution kernels of a network but the first one, which sees pixels and not features."""
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    return [conv.weight for conv in convs[1:] if conv.weight.requires_grad and conv.groups == 1]


def as_matrix(kernel: Tensor, channels_last: bool) -> Tensor:
    """[O, I, h, w] as [O, I*h*w], of kernels that lie in channels_last memory as [O, h*w*I]."""
    return (kernel.permute(0, 2, 3, 1) if channels_last else kernel).flatten(1)


class MuonBesideSGD:
    """Muon on the kernels and SGD on the rest, to a training loop one optimizer.

    Args:
        sgd: of the other parameters; counts its steps as `fastres.train.optimizer.SGDW` does.
        kernels: [O, I, h, w], each contiguous in memory or in channels_last memory.
        lr: peak learning rate of Muon.
        momentum, weight_decay: of Muon; the decay is decoupled, ``1 - lr * weight_decay``.

    Raises:
        ValueError: for a kernel whose memory is laid out otherwise.
    """

    def __init__(self, sgd: SGDW, kernels: list[Tensor], lr: float, momentum: float, weight_decay: float):
        self.sgd, self.kernels = sgd, kernels
        self._channels_last = [not kernel.is_contiguous() for kernel in kernels]
        self._matrices = [
            nn.Parameter(as_matrix(kernel.detach(), last)) for kernel, last in zip(kernels, self._channels_last)
        ]
        for kernel, matrix in zip(kernels, self._matrices):
            if kernel.data_ptr() != matrix.data_ptr():
                raise ValueError(f"a kernel {list(kernel.shape)} with strides {kernel.stride()} is not one matrix")
        self.muon = torch.optim.Muon(self._matrices, lr=lr, momentum=momentum, weight_decay=weight_decay)
        self._kernel_group: dict[str, Any] = {"params": kernels, "peak": lr, "lr": lr}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """SGD's groups and one of the kernels, with their learning rates."""
        return [*self.sgd.param_groups, self._kernel_group]

    @property
    def taken(self) -> int:
        """Calls of `step` in this process."""
        return self.sgd.taken

    def step(self) -> None:
        """One step of both."""
        self.sgd.step()
        for kernel, matrix, last in zip(self.kernels, self._matrices, self._channels_last):
            matrix.grad = None if kernel.grad is None else as_matrix(kernel.grad, last)
        self.muon.param_groups[0]["lr"] = self._kernel_group["lr"]
        self.muon.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget every gradient."""
        self.sgd.zero_grad(set_to_none)
        for parameter in (*self.kernels, *self._matrices):
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
        self.sgd.load_state_dict(state["sgd"])
        self.muon.load_state_dict(state["muon"])
