"""Offsets beyond 32 bits: the last program of a launch reaches the last element of tensors of more than 2^31."""

import pytest
import torch
from support_kernels import INTERPRETED, last_program_only, random_coef, span_of

from fastres import kernels

CHANNELS = 32
IMAGES = 5, 32769, 517, CHANNELS  # the last one begins beyond 2^31
MANY = 2**21 + 1, 4, 8, CHANNELS
WINDOW = 3, 2, (1, 1, 1, 1)

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter, which can leave memory untouched")


def large(shape=IMAGES, dtype=torch.float16):
    """Memory that is reserved, and never touched."""
    tensor = torch.empty(shape, dtype=dtype)
    assert tensor.numel() > 2**31
    return tensor


def pooled(dtype):
    """Of half the size, as the max-pool's result."""
    return torch.empty(IMAGES[0], 16385, 259, CHANNELS, dtype=dtype)


CASES = {
    "moments": lambda coef: (kernels.moments, [large()]),
    "bn_add_relu": lambda coef: (kernels.bn_add_relu, [large(), coef, large(), coef]),
    "bn_add_relu of every second pixel": lambda coef: (
        kernels.bn_add_relu,
        [pooled(torch.float16), coef, large(), None, True, 2],
    ),
    "bn_add_relu_backward": lambda coef: (
        kernels.bn_add_relu_backward,
        [large(), large(), large(), coef, large(), coef],
    ),
    "bn_backward_apply": lambda coef: (
        kernels.bn_backward_apply,
        [large(), large(), coef[:3].clone(), large()],
    ),
    "bn_relu_max_pool": lambda coef: (kernels.bn_relu_max_pool, [large(), coef, *WINDOW]),
    "bn_relu_max_pool_backward": lambda coef: (
        kernels.bn_relu_max_pool_backward,
        [pooled(torch.float16), pooled(torch.uint8), large(), coef, *WINDOW],
    ),
    "global_avg_pool": lambda coef: (kernels.global_avg_pool, [large(MANY)]),
    "global_avg_pool_backward": lambda coef: (
        kernels.global_avg_pool_backward,
        [torch.empty(MANY[0], CHANNELS, dtype=torch.float16), MANY[1:3]],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_last_element_is_reached(case):
    launch, arguments = CASES[case](random_coef(CHANNELS, 0))
    with last_program_only() as reached:
        result = launch(*arguments)
    results = result if isinstance(result, tuple) else (result,)
    for tensor in [*arguments, *results]:
        if isinstance(tensor, torch.Tensor) and tensor.numel() > 5 * CHANNELS:
            assert span_of(tensor) in reached, f"{case}: a tensor of shape {tuple(tensor.shape)}"
