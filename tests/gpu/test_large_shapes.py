"""Blocks of ResNet-50 at a batch of 64 in half precision, against fp64, in fenced and poisoned memory."""

import pytest
import torch
from support_fused import assert_as_good_as_eager, eager_residual, eager_stem, random_layer
from support_kernels import assert_same_bits, device
from support_triton import on_triton

from fastres import ops

pytestmark = pytest.mark.gpu

BATCH, SIZE = 64, 56


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shortcut", ["identity", "projection"])
def test_bottleneck(shortcut, dtype):
    identity = shortcut == "identity"
    width, stride = (64, 1) if identity else (128, 2)
    with device():
        x = torch.randn(BATCH, SIZE, SIZE, 256, dtype=torch.float64)
        layers = [
            random_layer(256, width, 1),
            random_layer(width, width, 3, stride),
            random_layer(width, 4 * width, 1),
        ]
        added = None if identity else random_layer(256, 4 * width, 1, stride)
    with on_triton():
        assert_as_good_as_eager(
            lambda x, layers, added: ops.residual_block(x, layers, x if identity else added)[0],
            lambda x, layers, added: eager_residual(x, layers, x if identity else added),
            (x, layers, added),
            dtype,
        )


def test_stem():
    with device():
        x, layer = torch.randn(BATCH, 4 * SIZE, 4 * SIZE, 3, dtype=torch.float64), random_layer(3, 64, 7, 2)
    pool = (3, 2, (1, 1, 1, 1))
    with on_triton():
        assert_as_good_as_eager(
            lambda x, layer: ops.stem(x, layer, *pool)[0],
            lambda x, layer: eager_stem(x, layer, *pool),
            (x, layer),
            torch.bfloat16,
        )


def test_the_same_bits_every_time():
    """Sums split over many programs."""
    with device():
        x = torch.randn(BATCH, SIZE, SIZE, 64).bfloat16()
        weight = torch.randn(64, 64, 3, 3).bfloat16().requires_grad_()
    layer = random_layer(64, 64, 3)._replace(weight=weight, norm=ops.Norm(None, None))

    def step():
        out, (used,) = ops.residual_block(x, [layer])
        return out, used.coef, *torch.autograd.grad(out.float().square().sum(), weight)

    assert_same_bits(step(), step())
