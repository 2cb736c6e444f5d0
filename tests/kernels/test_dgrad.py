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
from fastres.kernels.geometry import output_hw


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


def test_a_window_of_more_taps_than_a_division_by_shifts_takes():
    """The pixel reads the tap that the shifts would take for one of the next row."""
    dz, w, pad = randn(1, 1, 1, 16, seed=0), randn(16, 43, 43, 16, seed=1), (78, 84, 6, 0)
    dx, _ = guarded(conv_dgrad, dz, None, None, w, 2, pad, (2, 2), dilation=2)
    expected, _ = aten.conv_dgrad(dz.double(), None, None, w.double(), 2, pad, (2, 2), dilation=2)
    assert_as_good(dx, expected.float(), expected, terms=16)


def test_pixels_that_no_tap_reaches_get_the_residual_alone():
    dz, w, residual = randn(1, 3, 3, 16, seed=0), randn(16, 1, 1, 16, seed=1), randn(1, 5, 5, 16, seed=2)
    dx, _ = guarded(conv_dgrad, dz, None, None, w, 2, (0, 0, 0, 0), (5, 5), None, residual)
    assert_same_bits(dx[:, 1::2], residual[:, 1::2])
    assert_same_bits(dx[:, :, 1::2], residual[:, :, 1::2])
    assert (dx[:, ::2, ::2] != residual[:, ::2, ::2]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "kernel, stride, dilation, pad, inputs",
    [(1, 1, 1, 0, 24), (1, 1, 1, 0, 72), (1, 2, 1, 0, 40), (3, 1, 1, 1, 72), (3, 2, 1, 1, 24), (3, 1, 2, 2, 40),
     (3, 1, 1, 0, 40), (4, 3, 1, 1, 24), (5, 2, 2, 4, 24), (7, 3, 1, 2, 24)],
)  # fmt: skip
def test_the_gradient_that_is_multiplied_is_kept(kernel, stride, dilation, pad, inputs, dtype):
    """Rounded: the very values that the pass makes, each once. Over several tiles of channels, and of pixels, too."""
    pad, hw = (pad,) * 4, (9, 13)
    out_hw = output_hw(hw, (kernel, kernel), stride, pad, dilation)
    dz, y = (randn(2, *out_hw, 40, seed=seed, dtype=dtype) for seed in (0, 1))
    w, abc, dy = randn(40, kernel, kernel, inputs, seed=2, dtype=dtype), randn(3, 40, seed=3), torch.empty_like(dz)
    arguments = dz, y, abc, w, stride, pad, hw
    dx, _ = guarded(conv_dgrad, *arguments, dilation=dilation, dy=dy, mutates=(dy,))
    assert_same_bits(dx, conv_dgrad(*arguments, dilation=dilation)[0])
    exact = abc.double()[0] * dz.double() + abc.double()[1] * y.double() + abc.double()[2]
    assert_as_good(dy, exact.to(dtype), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel, stride, inputs", [(1, 1, 24), (3, 1, 136), (3, 2, 40), (1, 2, 72)])
def test_the_activation_below_is_kept(kernel, stride, inputs, dtype):
    """At all pixels, those that no tap reaches too: what a pass makes of them; the gradient and its sums are the same
    bits as without it."""
    pad, hw = (kernel // 2,) * 4, (7, 10)
    dz = randn(2, *(-(-size // stride) for size in hw), 40, seed=0, dtype=dtype)
    w, x = randn(40, kernel, kernel, inputs, seed=1, dtype=dtype), randn(2, *hw, inputs, seed=2, dtype=dtype)
    coef, kept = random_coef(inputs, 3), torch.empty_like(x)
    arguments = dz, None, None, w, stride, pad, hw, (x, coef)
    made = guarded(conv_dgrad, *arguments, activation=kept, mutates=(kept,))
    assert_same_bits(made, conv_dgrad(*arguments))
    exact = (x.double() * coef.double()[3] + coef.double()[4]).relu()
    assert_as_good(kept, exact.to(dtype), exact)


def test_an_activation_that_is_not_computed_is_refused():
    dz, w = randn(1, 4, 4, 16, seed=0), randn(16, 1, 1, 16, seed=1)
    arguments = dz, None, None, w, 1, (0,) * 4, (4, 4)
    with pytest.raises(ValueError, match="with the BatchNorm below and without a mask"):
        conv_dgrad(*arguments, activation=dz.clone())
    with pytest.raises(ValueError, match="with the BatchNorm below and without a mask"):
        conv_dgrad(*arguments, below=(dz, random_coef(16, 2)), mask=dz, activation=dz.clone())


@pytest.mark.parametrize(
    "kernel, pad, dilation, behind",
    [(3, 2, 2, False), (1, 1, 1, True), (3, 1, 2, True), (2, 1, 1, True), (3, 3, 1, True)],
)
def test_a_gradient_that_cannot_be_kept(kernel, pad, dilation, behind):
    """Without a BatchNorm, of more pixels than are read, and of a padding that ends between two taps."""
    pad, hw = (pad,) * 4, (4, 4)
    dz = randn(1, *output_hw(hw, (kernel, kernel), 1, pad, dilation), 16, seed=0)
    w, abc = randn(16, kernel, kernel, 16, seed=1), randn(3, 16, seed=2) if behind else None
    with pytest.raises(ValueError, match=f"not by {kernel}x{kernel} with stride 1 and padding"):
        conv_dgrad(dz, dz, abc, w, 1, pad, hw, dilation=dilation, dy=dz.clone())


def test_padding_is_zero_whatever_the_coefficients():
    """Pixels that no pixel of dz reaches get 0, where those of dz are NaN."""
    dz, w = randn(1, 2, 2, 16, seed=0), randn(16, 3, 3, 64, seed=1)
    abc = torch.full((3, 16), torch.nan, device=dz.device)
    dx, _ = conv_dgrad(dz, dz, abc, w, 3, (0, 0, 0, 0), (9, 9))
    assert dx[:, :6, :6].isnan().all() and (dx[:, 6:] == 0).all() and (dx[:, :, 6:] == 0).all()
