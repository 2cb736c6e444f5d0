"""The end of a residual block and its backward, against fp64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support_flat import aten
from support_kernels import (
    DTYPES,
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

from fastres import kernels

shortcuts = st.sampled_from(["none", "identity", "projection"])


def shortcut_of(kind, shape, seed, dtype):
    """Shortcut and its coefficients."""
    if kind == "none":
        return None, None
    return randn(*shape, seed=seed, dtype=dtype), random_coef(shape[3], seed + 1) if kind == "projection" else None


def compare(ours, reference, arguments, summed=lambda result: result):
    """The launcher against ``reference`` in the arguments' dtypes and in fp64."""
    wide = [v.double() if isinstance(v, torch.Tensor) else v for v in arguments]
    results = guarded(ours, *arguments), reference(*arguments), reference(*wide)
    assert_as_good(*map(summed, results))


def with_summed_tiles(result):
    """dz and the sums over the tiles, which launchers and reference choose for themselves."""
    return tuple(t if t is None or t.dim() == 4 else t.sum(0) for t in result)


@few_examples
@given(nhwc_shapes(), dtypes(), shortcuts, st.booleans(), seeds())
def test_bn_add_relu(shape, dtype, kind, relu, seed):
    y, shortcut = randn(*shape, seed=seed, dtype=dtype), shortcut_of(kind, shape, seed + 1, dtype)
    compare(kernels.bn_add_relu, aten.bn_add_relu, (y, random_coef(shape[3], seed), *shortcut, relu))


@few_examples
@given(nhwc_shapes(60), dtypes(), st.integers(1, 3), st.sampled_from([0, 0, 1, 7]), st.booleans(), seeds())
def test_every_few_pixels_of_a_shortcut_are_added(shape, dtype, stride, added, relu, seed):
    """Of odd and even sizes; the channels that it has not stay as they are."""
    n, height, width, channels = shape
    y = randn(n, -(-height // stride), -(-width // stride), channels + added, seed=seed, dtype=dtype)
    shortcut = randn(*shape, seed=seed + 1, dtype=dtype)
    compare(
        kernels.bn_add_relu, aten.bn_add_relu, (y, random_coef(channels + added, seed), shortcut, None, relu, stride)
    )


def test_many_tiles_of_a_strided_shortcut():
    y, shortcut = randn(3, 25, 15, 136, seed=0), randn(3, 50, 29, 72, seed=1)
    compare(kernels.bn_add_relu, aten.bn_add_relu, (y, random_coef(136, 2), shortcut, None, True, 2))


@few_examples
@given(nhwc_shapes(), dtypes(), shortcuts, st.booleans(), seeds())
def test_bn_add_relu_backward(shape, dtype, kind, relu, seed):
    y, dout = randn(2, *shape, seed=seed, dtype=dtype)
    shortcut, coef = shortcut_of(kind, shape, seed + 1, dtype), random_coef(shape[3], seed)
    out = aten.bn_add_relu(y, coef, *shortcut) if relu else None
    arguments = dout, out, y, coef, *shortcut
    compare(kernels.bn_add_relu_backward, aten.bn_add_relu_backward, arguments, with_summed_tiles)
    apart, ours = kernels.bn_add_relu_backward(*arguments), dout.clone()
    in_place = kernels.bn_add_relu_backward(ours, *arguments[1:], in_place=True)
    assert in_place[0] is ours
    for one, other in zip(in_place, apart, strict=True):
        assert one is other is None or torch.equal(one, other)


@few_examples
@given(nhwc_shapes(), dtypes(), st.booleans(), st.booleans(), seeds())
def test_bn_backward_apply(shape, dtype, trained, residual, seed):
    dz, y, added = randn(3, *shape, seed=seed, dtype=dtype)
    abc = randn(3, shape[3], seed=seed + 1)
    arguments = dz, y if trained else None, abc, added if residual else None
    compare(kernels.bn_backward_apply, aten.bn_backward_apply, arguments)


@pytest.mark.parametrize("shape", [(2, 25, 15, 72), (1, 40, 60, 3), (1, 3, 3, 260)], ids=str)
def test_many_tiles_of_rows_and_channels(shape):
    dout, y, shortcut = randn(3, *shape, seed=0)
    coef, shortcut_coef = random_coef(shape[3], 1), random_coef(shape[3], 2)
    compare(kernels.bn_add_relu, aten.bn_add_relu, (y, coef, shortcut, shortcut_coef))
    arguments = dout, aten.bn_add_relu(y, coef, shortcut, shortcut_coef), y, coef, shortcut, shortcut_coef
    compare(kernels.bn_add_relu_backward, aten.bn_add_relu_backward, arguments, with_summed_tiles)
    compare(kernels.bn_backward_apply, aten.bn_backward_apply, (dout, y, randn(3, shape[3], seed=3)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_is_autograds(dtype):
    """Statistics, forward and backward together are PyTorch's BatchNorm, addition and ReLU."""
    shape, eps = (3, 7, 6, 24), 1e-3
    y, shortcut, dout = randn(3, *shape, seed=0, dtype=dtype)
    y = (y.float() * 2 + 5).to(dtype)
    gamma, beta = randn(2, 24, seed=1)

    def eager(wide):
        def leaf(t):
            return (t.double() if wide else t).detach().requires_grad_()

        leaves = leaf(y), leaf(shortcut), leaf(gamma), leaf(beta)
        z = F.batch_norm(leaves[0].permute(0, 3, 1, 2), None, None, *leaves[2:], training=True, eps=eps)
        out = F.relu(z.permute(0, 2, 3, 1) + leaves[1])
        return out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))

    coef = kernels.finalize(kernels.moments(y), gamma, beta, eps)
    out = kernels.bn_add_relu(y, coef, shortcut)
    dz, sums, shortcut_sums = kernels.bn_add_relu_backward(dout, out, y, coef)
    abc, dgamma, dbeta = kernels.bn_backward_coef(sums, coef, 3 * 7 * 6, True)
    dy = kernels.bn_backward_apply(dz, y, abc)
    assert shortcut_sums is None
    assert_as_good((out, dy, dz, dgamma, dbeta), eager(False), eager(True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays(dtype):
    y = torch.full((1, 1, 1, 3), torch.nan, dtype=dtype, device=device())
    coef, dout = random_coef(3, 0), torch.ones_like(y)
    assert guarded(kernels.bn_add_relu, y, coef).isnan().all()
    assert_same_bits(guarded(kernels.bn_add_relu_backward, dout, y, torch.ones_like(y), coef)[0], dout)


def test_no_gradient_where_the_result_is_zero():
    out = torch.tensor([0.0, -0.0, 1e-38, 2.0], device=device()).view(1, 1, 1, 4)
    dz, _, _ = kernels.bn_add_relu_backward(torch.ones_like(out), out, out, random_coef(4, 0))
    assert dz.flatten().tolist() == [0, 0, 1, 1]


def test_without_relu_dz_is_a_copy():
    dout = randn(1, 2, 2, 8, seed=0)
    dz, _, _ = kernels.bn_add_relu_backward(dout, None, randn(1, 2, 2, 8, seed=1), random_coef(8, 2))
    assert_same_bits(dz, dout)
    assert dz.data_ptr() != dout.data_ptr()


def test_the_same_bits_from_run_to_run():
    dout, y, shortcut = randn(3, 2, 25, 15, 72, seed=0)
    coef, shortcut_coef = random_coef(72, 1), random_coef(72, 2)
    first, second = (kernels.bn_add_relu_backward(dout, y, y, coef, shortcut, shortcut_coef) for _ in range(2))
    assert_same_bits(first, second)
