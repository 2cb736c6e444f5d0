"""The running statistics of a BatchNorm, moved in place by one launch."""

import torch
from torch import Tensor

from fastres.ops.aten import VAR
from fastres.ops.layers import Statistics, check_device, contiguous_vector
from fastres.ops.select import primitives
from fastres.ops.synchronise import COUNT


def update_running(running_mean: Tensor, running_var: Tensor, statistics: Statistics, momentum: float | Tensor) -> None:
    """In place: move the running mean, and the unbiased variance, towards the batch's by ``momentum``.

    Args:
        running_mean, running_var: [C].
        momentum: a number, or a 0-d tensor on their device, so that nothing waits for it.

    Raises:
        RuntimeError: as `torch.nn.functional.batch_norm` raises it.
    """
    coef, count = statistics
    running = {"running_mean": running_mean, "running_var": running_var}
    for name, tensor in running.items():
        if tensor.numel() != coef.shape[1]:
            raise RuntimeError(f"{name} should contain {coef.shape[1]} elements not {tensor.numel()}")
        check_device(tensor, name, coef.device)
    vectors = [contiguous_vector(tensor) for tensor in running.values()]
    if coef.shape[0] > COUNT:  # synchronised: how many pixels there were only the device knows
        total = coef[COUNT]
        coef, count = coef.clone(), 2  # whose own factor is 2 / (2 - 1)
        coef[VAR] *= total / (total - 1) / 2
    on_device = isinstance(momentum, Tensor)
    update_running_(*vectors, coef, count, momentum if on_device else None, 0.0 if on_device else momentum)
    for tensor, vector in zip(running.values(), vectors):
        if tensor is not vector:
            tensor.copy_(vector.view_as(tensor))


@torch.library.custom_op("fastres::update_running", mutates_args=("running_mean", "running_var"))
def update_running_(
    running_mean: Tensor, running_var: Tensor, coef: Tensor, count: int, momentum_tensor: Tensor | None, momentum: float
) -> None:
    """See `update_running`; ``momentum_tensor`` replaces ``momentum``."""
    p = primitives(coef)
    p.update_running(running_mean, running_var, coef, count, momentum if momentum_tensor is None else momentum_tensor)


@update_running_.register_fake
def _(running_mean, running_var, coef, count, momentum_tensor, momentum):
    return None
