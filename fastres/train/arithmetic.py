"""The arithmetic of a training run: what to compare recipes by, whatever machine they run on."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastres.models.registry import create_model
from fastres.train.muon import hidden_kernels
from fastres.train.progressive import size_at
from fastres.train.trainer import Trainer


def image_flops(model: nn.Module, size: int) -> int:
    """Floating-point operations (two a multiplication with addition) of the forward and backward pass of one image of
    ``size`` pixels a side in training: those of convolutions and linear layers, the padding's products included.

    Args:
        model: eager, on the meta device; what needs no gradient costs none.
    """
    total = 0

    def count(layer: nn.Conv2d | nn.Linear, inputs: tuple[Tensor], result: Tensor) -> None:
        nonlocal total
        forward = 2 * layer.weight.numel() * result[0].numel() // result.shape[1]
        total += forward * (1 + layer.weight.requires_grad + inputs[0].requires_grad)

    handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    model.eval()(torch.empty(1, 3, size, size, device="meta"))  # its shapes are those of training
    for handle in handles:
        handle.remove()
    return total


def muon_flops(model: nn.Module) -> int:
    """Those of one step of Muon on the convolution kernels: its Newton-Schulz iterations."""
    matrices = [nn.Parameter(torch.empty_like(kernel.detach().flatten(1))) for kernel in hidden_kernels(model)]
    for matrix in matrices:
        matrix.grad = torch.empty_like(matrix)
    if not matrices:
        return 0
    with FlopCounterMode(display=False) as counter:
        torch.optim.Muon(matrices, lr=1.0).step()
    return counter.get_total_flops()


def run_flops(trainer: Trainer) -> float:
    """Floating-point operations of a whole training run, the optimizer's matrix products included and validation not.

    What ``--checkpoint-every`` or ``--recompute`` compute again is not counted, as it teaches nothing.
    """
    config = trainer.config
    with torch.device("meta"):
        model = create_model(config.model, num_classes=len(trainer.dataset.classes), **trainer.model_options)
    for meta, own in zip(model.parameters(), trainer.model.parameters(), strict=True):
        meta.requires_grad_(own.requires_grad)
    steps = trainer.total_steps
    total = float(steps * muon_flops(model)) if config.optimizer == "muon" else 0.0
    sizes: dict[int, int] = {}
    for step in range(steps):
        size = size_at(trainer.stages, step, steps) or trainer.image_size
        sizes[size] = sizes.get(size, 0) + 1
    return total + sum(count * config.batch_size * image_flops(model, size) for size, count in sizes.items())
