"""Steps of training on a GPU, in turn and as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from support_kernels import device
from torch import Tensor, nn


def batch(count: int) -> tuple[Tensor, Tensor]:
    """Images of 32 pixels and labels."""
    x = torch.randn(count, 3, 32, 32).to(device()).contiguous(memory_format=torch.channels_last)
    return x, torch.randint(10, (count,)).to(device())


def descent(model: nn.Module, x: Tensor, labels: Tensor, amp: bool = True) -> Callable[[], Tensor]:
    """A function that takes a step of gradient descent in place, in bf16 with ``amp``, and returns the loss."""
    parameters = list(model.parameters())

    def step() -> Tensor:
        with torch.autocast(device().type, torch.bfloat16, enabled=amp, cache_enabled=False):
            loss = F.cross_entropy(model(x), labels)
        grads = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, grad in zip(parameters, grads):
                parameter.sub_(grad, alpha=0.05)
        return loss.detach()

    return step


def captured(
    step: Callable[[], Tensor], model: nn.Module, start: Mapping[str, Tensor]
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A step as a graph, and the loss that its replays write; the model is at ``start`` again.

    A few steps come first, which compile the kernels.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    model.load_state_dict(start)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    return graph, loss
