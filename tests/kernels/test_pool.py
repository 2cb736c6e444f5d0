"""Max-pool of the normalised image and the global average pool, with their backwards, against fp64 and by hand."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support_flat import aten
from support_kernels import (
    assert_as_good,
    assert_same_bits,
    device,
    dtypes,
    few_examples,
    guarded,
    nhwc_shapes,
    randn,
    random_coef,
    seeds,
)

from fastres.kernels import pool
from fastres.kernels.geometry import output_hw

STEM = 3, 2, (1, 1, 1, 1)


@st.composite
def pools(draw):
    """Shape of an image, and kernel, stride and padding (symmetric, 'SAME', any) that leave at least one window."""
    kernel, stride = draw(st.sampled_from([1, 2, 3, 5])), draw(st.integers(1, 5))
    pad = tuple(draw(st.integers(0, kernel - 1)) for _ in range(4))
    shape = draw(nhwc_shapes(max_pixels=120).filter(lambda s: min(output_hw(s[1:3], (kernel, kernel), 1, pad)) > 0))
    return shape, (kernel, stride, pad)


def identity(channels):
    """Coefficients that change nothing."""
    return torch.tensor([0.0, 1, 1, 1, 0], device=device())[:, None].repeat(1, channels)


def doubled(*tensors):
    return [t.double() if t.is_floating_point() else t for t in tensors]


@few_examples
@given(pools(), dtypes(), seeds())
def test_bn_relu_max_pool(drawn, dtype, seed):
    shape, window = drawn
    y, coef = randn(*shape, seed=seed, dtype=dtype), random_coef(shape[3], seed)
    ours, eager = guarded(pool.bn_relu_max_pool, y, coef, *window), aten.bn_relu_max_pool(y, coef, *window)
    assert_as_good(ours[0], eager[0], aten.bn_relu_max_pool(*doubled(y, coef), *window)[0])


@few_examples
@given(pools(), dtypes(), seeds())
def test_the_winner_is_the_first_among_equals(drawn, dtype, seed):
    """Small integers, exact in every dtype and full of equals, most of all the ReLU's zeros."""
    shape, window = drawn
    y = randn(*shape, seed=seed).round().to(dtype)
    coef = identity(shape[3])
    coef[3], coef[4] = 2, -1
    assert_same_bits(guarded(pool.bn_relu_max_pool, y, coef, *window), aten.bn_relu_max_pool(y, coef, *window))


@few_examples
@given(pools(), dtypes(), seeds())
def test_bn_relu_max_pool_backward(drawn, dtype, seed):
    shape, window = drawn
    y, coef = randn(*shape, seed=seed, dtype=dtype), random_coef(shape[3], seed)
    out, index = aten.bn_relu_max_pool(y, coef, *window)
    dout = randn(*out.shape, seed=seed + 1, dtype=dtype)
    arguments = dout, index, y, coef
    results = (
        guarded(pool.bn_relu_max_pool_backward, *arguments, *window),
        aten.bn_relu_max_pool_backward(*arguments, *window),
        aten.bn_relu_max_pool_backward(*doubled(*arguments), *window),
    )
    assert_as_good(*((dz, sums.sum(0)) for dz, sums in results))


@pytest.mark.parametrize("stride", [2, 3, 4, 7])
@pytest.mark.parametrize("kernel", [2, 7, 8])
def test_a_pixel_of_a_strided_pool_gets_the_gradients_of_its_windows(kernel, stride):
    """Squares of small strides are unrolled, of large ones not."""
    y, window = randn(2, 19, 23, 3, seed=0), (kernel, stride, (1, 0, 1, 1))
    arguments = identity(3), *window
    out, index = aten.bn_relu_max_pool(y, *arguments)
    dout = randn(*out.shape, seed=1)
    dz, sums = guarded(pool.bn_relu_max_pool_backward, dout, index, y, *arguments)
    exact, exact_sums = aten.bn_relu_max_pool_backward(*doubled(dout, index, y), *doubled(identity(3)), *window)
    assert_as_good((dz, sums.sum(0)), (exact.float(), exact_sums.sum(0).float()), (exact, exact_sums.sum(0)))


@pytest.mark.parametrize("channels", [5, 136])
def test_max_pool_and_its_backward_are_autograds(channels):
    """The stem's pool, over several tiles of pixels and channels."""
    y, coef = randn(2, 15, 12, channels, seed=0), random_coef(channels, 1)
    leaf = y.double().requires_grad_()
    z = leaf * coef[3].double() + coef[4].double()
    z.retain_grad()
    exact = F.max_pool2d(z.relu().permute(0, 3, 1, 2), 3, 2, 1).permute(0, 2, 3, 1)
    dout = randn(*exact.shape, seed=2)
    exact.backward(dout.double())
    out, index = guarded(pool.bn_relu_max_pool, y, coef, *STEM)
    dz, sums = guarded(pool.bn_relu_max_pool_backward, dout, index, y, coef, *STEM)
    xhat = (y.double() - coef[0]) * coef[2]
    exact_sums = torch.stack([z.grad.sum((0, 1, 2)), (z.grad * xhat).sum((0, 1, 2))])
    for ours, expected in ((out, exact.detach()), (dz, z.grad), (sums.sum(0), exact_sums)):
        assert_as_good(ours, expected.float(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_wins(dtype):
    y = torch.tensor([1.0, torch.nan, 3.0, 2.0], device=device()).to(dtype).view(1, 2, 2, 1)
    arguments = y, identity(1), 2, 1, (0, 0, 0, 0)
    out, index = guarded(pool.bn_relu_max_pool, *arguments)
    assert out.isnan().all() and index.item() == 1
    assert_same_bits(index, aten.bn_relu_max_pool(*arguments)[1])
    dz, _ = pool.bn_relu_max_pool_backward(torch.ones_like(out), index, *arguments)
    assert dz.flatten().tolist() == [0, 1, 0, 0]


def test_padding_never_wins():
    y = torch.zeros(1, 1, 1, 1, device=device())
    out, index = pool.bn_relu_max_pool(y, identity(1), 3, 1, (1, 1, 1, 1))
    assert out.item() == 0 and index.item() == 4


def test_a_pixel_that_wins_several_windows_gets_all_their_gradients():
    y = torch.tensor([0.0, 0, 9, 0, 0], device=device()).view(1, 1, 5, 1)
    window = 3, 1, (1, 1, 1, 1)
    out, index = pool.bn_relu_max_pool(y, identity(1), *window)
    dz, sums = pool.bn_relu_max_pool_backward(torch.ones_like(out), index, y, identity(1), *window)
    assert out.flatten().tolist() == [0, 9, 9, 9, 0]
    assert dz.flatten().tolist() == [0, 0, 3, 0, 0]
    assert sums.flatten().tolist() == [3, 27]


def test_a_kernel_whose_taps_fill_no_byte_is_refused():
    with pytest.raises(ValueError, match="kernel of the max-pool is 17: at most 16"):
        pool.bn_relu_max_pool(torch.zeros(1, 20, 20, 1, device=device()), identity(1), 17, 1, (0, 0, 0, 0))


@few_examples
@given(nhwc_shapes(), dtypes(), seeds())
def test_global_avg_pool(shape, dtype, seed):
    x = randn(*shape, seed=seed, dtype=dtype)
    exact = x.double().mean((1, 2))
    assert_as_good(guarded(pool.global_avg_pool, x), aten.global_avg_pool(x), exact)


@few_examples
@given(nhwc_shapes(), dtypes(), seeds())
def test_global_avg_pool_backward(shape, dtype, seed):
    dout, hw = randn(shape[0], shape[3], seed=seed, dtype=dtype), shape[1:3]
    exact = (dout.double() / (hw[0] * hw[1]))[:, None, None].expand(shape)
    ours, eager = guarded(pool.global_avg_pool_backward, dout, hw), aten.global_avg_pool_backward(dout, hw)
    assert_as_good(ours, eager, exact)


def test_global_avg_pool_of_many_tiles():
    x = randn(2, 20, 17, 200, seed=0)
    exact = x.double().mean((1, 2))
    assert_as_good(guarded(pool.global_avg_pool, x), exact.float(), exact)
    dx = guarded(pool.global_avg_pool_backward, x[:, 0, 0], (20, 17))
    assert_as_good(dx, (x[:, :1, :1] / 340).expand_as(x), (x[:, :1, :1].double() / 340).expand_as(x))


def test_the_same_bits_from_run_to_run():
    y, coef = randn(2, 15, 12, 72, seed=0), random_coef(72, 1)
    out, index = pool.bn_relu_max_pool(y, coef, *STEM)
    first, second = (pool.bn_relu_max_pool_backward(out, index, y, coef, *STEM) for _ in range(2))
    assert_same_bits(first, second)
