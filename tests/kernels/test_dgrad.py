"""Data gradient with BatchNorm's backward before and the ReLU mask and sums behind, against fp64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support_conv import BACKWARDS, exact, problems
from support_flat import aten
from support_kernels import (
    DTYPES,
    assert_as_good,
    assert_same_bits,
    few_examples,
    guarded,
    randn,
    random_coef,
)

from fastres.kernels.dgrad import conv_dgrad


def total(result):
    """Gradient and the tiles' sums together."""
    dx, sums = result
    return dx, None if sums is None else sums.double().sum(0).float()


residuals = st.sampled_from(["none", "like x", "strided", "strided, wider"])


def residual_of(kind, p):
    """A residual and its stride."""
    if not kind.startswith("strided"):
        return (p.x(10) if kind == "like x" else None), 1
    stride = 2 + p.seed % 2
    hw = [-(-size // stride) for size in p.hw]
    return randn(p.n, *hw, p.inputs + 5 * ("wider" in kind), seed=p.seed + 10, dtype=p.dtype), stride


@few_examples
@given(problems(), st.sampled_from(BACKWARDS), st.sampled_from(["nothing", "norm", "end of a block"]), residuals)
def test_conv_dgrad(problem, prologue, below, add):
    p = problem
    y, abc = p.batch_norm_backward(prologue, 8)
    norm, mask = None if below == "nothing" else (p.x(), p.coef()), p.x(11) if below == "end of a block" else None
    residual, stride = residual_of(add, p)
    args = (p.y(9), y, abc, p.w(), p.stride, p.pad, p.hw, norm, residual, mask, stride)
    ours = total(guarded(conv_dgrad, *args, rank=p.rank, dilation=p.dilation))
    eager = total(aten.conv_dgrad(*args, dilation=p.dilation))
    reference = aten.conv_dgrad(*exact(args), dilation=p.dilation)
    terms = p.kernel**2 * p.outputs
    assert_as_good(ours[0], eager[0], reference[0], terms=terms)
    if norm:  # sums are of the stored gradient, whose roundings they carry: what these may be is granted
        assert_as_good(ours[1], eager[1], reference[1].sum(0), rounding=p.dtype, terms=terms)


def test_the_same_bits_every_time():
    dz, w, x = randn(2, 5, 4, 40, seed=0), randn(40, 3, 3, 24, seed=1), randn(2, 9, 7, 24, seed=2)
    runs = [conv_dgrad(dz, None, None, w, 2, (1, 1, 1, 1), (9, 7), (x, random_coef(24, 3))) for _ in range(2)]
    assert_same_bits(*runs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel, stride", [(1, 1), (3, 1), (3, 2)])
def test_a_residual_of_every_second_pixel(kernel, stride, dtype):
    """Of an odd image over several tiles: each gradient with it is the one without it, and the residual there."""
    hw, pad = (15, 21), (kernel // 2,) * 4
    dz = randn(1, *(-(-size // stride) for size in hw), 16, seed=0, dtype=dtype)
    w, residual = randn(16, kernel, kernel, 24, seed=1, dtype=dtype), randn(1, 8, 11, 40, seed=2, dtype=dtype)
    exact = aten.conv_dgrad(dz.double(), None, None, w.double(), stride, pad, hw)[0]
    exact[:, ::2, ::2] += residual[..., :24].double()
    arguments = dz, None, None, w, stride, pad, hw, None, residual, None, 2
    dx, _ = guarded(conv_dgrad, *arguments)
    assert_as_good(dx, aten.conv_dgrad(*arguments)[0], exact, terms=16 * kernel**2)
    assert_same_bits(dx[:, 1::2], guarded(conv_dgrad, *arguments[:7])[0][:, 1::2])


def test_pixels_that_no_tap_reaches_get_the_residual_alone():
    dz, w, residual = randn(1, 3, 3, 16, seed=0), randn(16, 1, 1, 16, seed=1), randn(1, 5, 5, 16, seed=2)
    dx, _ = guarded(conv_dgrad, dz, None, None, w, 2, (0, 0, 0, 0), (5, 5), None, residual)
    assert_same_bits(dx[:, 1::2], residual[:, 1::2])
    assert_same_bits(dx[:, :, 1::2], residual[:, :, 1::2])
    assert (dx[:, ::2, ::2] != residual[:, ::2, ::2]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride, inputs", [(1, 24), (1, 72), (2, 40)])
def test_the_gradient_of_a_pointwise_convolution_is_kept(stride, inputs, dtype):
    """As it is multiplied, rounded: the very values that the pass makes. Over several tiles of channels, too."""
    dz, y = (randn(2, 5, 4, 40, seed=seed, dtype=dtype) for seed in (0, 1))
    w, abc, dy = randn(40, 1, 1, inputs, seed=2, dtype=dtype), randn(3, 40, seed=3), torch.empty_like(dz)
    arguments = dz, y, abc, w, stride, (0, 0, 0, 0), (5 * stride, 4 * stride)
    dx, _ = guarded(conv_dgrad, *arguments, dy=dy, mutates=(dy,))
    assert_same_bits(dx, conv_dgrad(*arguments)[0])
    exact = abc.double()[0] * dz.double() + abc.double()[1] * y.double() + abc.double()[2]
    assert_as_good(dy, exact.to(dtype), exact)


@pytest.mark.parametrize(
    "kernel, pad, behind", [(3, (1, 1, 1, 1), True), (1, (1, 1, 1, 1), True), (1, (0,) * 4, False)]
)
def test_a_gradient_that_cannot_be_kept(kernel, pad, behind):
    dz, w = randn(1, 4, 4, 16, seed=0), randn(16, kernel, kernel, 16, seed=1)
    with pytest.raises(ValueError, match=f"not by {kernel}x{kernel} with padding"):
        conv_dgrad(dz, dz, randn(3, 16, seed=2) if behind else None, w, 1, pad, (4, 4), dy=dz.clone())


def test_padding_is_zero_whatever_the_coefficients():
    """Pixels that no pixel of dz reaches get 0, where those of dz are NaN."""
    dz, w = randn(1, 2, 2, 16, seed=0), randn(16, 3, 3, 64, seed=1)
    abc = torch.full((3, 16), torch.nan, device=dz.device)
    dx, _ = conv_dgrad(dz, dz, abc, w, 3, (0, 0, 0, 0), (9, 9))
    assert dx[:, :6, :6].isnan().all() and (dx[:, 6:] == 0).all() and (dx[:, :, 6:] == 0).all()
