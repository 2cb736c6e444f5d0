"""Global average pool over the pixels."""

from typing import Any

import torch
from torch import Tensor

from fastres.ops import plain
from fastres.ops.backends.fake import Fake
from fastres.ops.layers import check_activations, dense, nchw_size
from fastres.ops.operation import isolated, operation, without_autocast
from fastres.ops.select import backend_for


def global_avg_pool(x: Tensor) -> Tensor:
    """Mean over the pixels of x [N, H, W, C]: [N, C] in x's dtype, accumulated in fp32; differentiable.

    Raises:
        RuntimeError: as `torch.nn.functional.adaptive_avg_pool2d` raises it.
    """
    check_activations(x)
    if 0 in x.shape[1:3]:
        raise RuntimeError(
            "global_avg_pool(): Expected input to have non-zero size for non-batch dimensions, but input has sizes "
            f"{nchw_size(tuple(x.shape))}"
        )
    x = x.contiguous()
    return _plain(x) if plain.is_needed(x) else _GlobalAvgPool.apply(x)


@without_autocast
def _plain(x: Tensor) -> Tensor:
    return torch.nn.functional.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), 1)[:, :, 0, 0]


class _GlobalAvgPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.hw = x.shape[1:3]
        return global_avg_pool_forward(x)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        dout = dense(dout)
        height, width = ctx.hw
        if plain.is_differentiated(dout):
            return (dout / (height * width))[:, None, None].expand(-1, height, width, -1)
        return global_avg_pool_backward(dout, height, width)


@operation("global_avg_pool_forward")
def global_avg_pool_forward(x: Tensor) -> Tensor:
    """[N, C] of [N, H, W, C]."""
    with isolated(x):
        return backend_for(x).global_avg_pool(x)


@global_avg_pool_forward.register_fake
def _(x):
    return Fake().global_avg_pool(x)


@operation("global_avg_pool_backward")
def global_avg_pool_backward(dout: Tensor, height: int, width: int) -> Tensor:
    """[N, height, width, C] of [N, C]."""
    with isolated(dout):
        return backend_for(dout).global_avg_pool_backward(dout, (height, width))


@global_avg_pool_backward.register_fake
def _(dout, height, width):
    return Fake().global_avg_pool_backward(dout, (height, width))
