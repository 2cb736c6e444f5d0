"""The stem with its max-pool."""

from functools import partial

import pytest
import torch
from support_fused import assert_as_good_as_eager, cast, eager_stem, leaves, random_layer
from support_ops import opcheck

from fastres.ops import Layer, stem

IMAGENET = dict(kernel=3, stride=2, pad=(1, 1, 1, 1))
NOTEBOOK = dict(kernel=3, stride=2, pad=(0, 0, 1, 1))
APART = dict(kernel=2, stride=3, pad=(0, 0, 0, 0))  # windows that leave pixels out


def both(pool):
    return lambda x, layer: stem(x, layer, **pool)[0], partial(eager_stem, **pool)


@pytest.mark.parametrize("pool", [IMAGENET, NOTEBOOK, APART], ids=["imagenet", "notebook", "apart"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_errs_no_more_than_eager(dtype, pool):
    x = torch.randn(2, 19, 18, 3, dtype=torch.float64)
    assert_as_good_as_eager(*both(pool), (x, random_layer(3, 10, 5, 2, (1, 1, 2, 2))), dtype)


@pytest.mark.parametrize("norm", [dict(gamma=False), dict(frozen=True)], ids=str)
def test_norms_of_other_kinds(norm):
    x = torch.randn(2, 11, 12, 3, dtype=torch.float64)
    assert_as_good_as_eager(*both(IMAGENET), (x, random_layer(3, 10, 7, 2, **norm)), torch.float64)


def test_bf16_picks_the_same_winners_as_the_pool_of_its_own_activations():
    """In bf16 equal values abound: gradients must go where eager PyTorch sends them."""
    x = torch.randn(2, 16, 16, 3, dtype=torch.float64)
    assert_as_good_as_eager(*both(IMAGENET), (x, random_layer(3, 8, 7, 2)), torch.bfloat16)


def test_gradcheck():
    x = torch.randn(1, 6, 5, 2, dtype=torch.float64, requires_grad=True)
    layer = cast(random_layer(2, 3, 3), torch.float64)

    def function(x, weight, gamma, beta):
        return stem(x, Layer(weight, layer.norm._replace(gamma=gamma, beta=beta), 1, layer.pad), **IMAGENET)[0]

    assert torch.autograd.gradcheck(function, (x, *leaves(layer)))


@pytest.mark.parametrize("need_x", [True, False])
def test_opcheck(need_x):
    x, layer = cast([torch.randn(2, 9, 8, 3), random_layer(3, 4, 3)], torch.float32)
    opcheck(lambda: stem(x if need_x else x.detach(), layer, **IMAGENET)[0])


def test_pool_larger_than_its_input():
    with pytest.raises(RuntimeError, match=r"Given input size: \(4x2x2\). Output size is too small"):
        stem(torch.randn(2, 2, 2, 3), cast(random_layer(3, 4, 3), torch.float32), 5, 2, (1, 1, 1, 1))


def test_windows_whose_pixels_a_byte_does_not_tell_apart_are_refused():
    with pytest.raises(ValueError, match="kernel of the max-pool is 17: at most 16"):
        stem(torch.randn(2, 20, 20, 3), cast(random_layer(3, 4, 3), torch.float32), 17, 2, (8, 8, 8, 8))
