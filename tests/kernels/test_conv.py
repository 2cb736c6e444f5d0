"""Convolution with BatchNorm prologue and statistics, and the inference convolution, against fp64."""

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support_conv import exact, problems, statistics
from support_flat import aten
from support_kernels import assert_as_good, assert_same_bits, few_examples, guarded, randn, random_coef

from fastres.kernels.conv import bn_add_relu_conv, conv, conv_bias_act, conv_kernel
from fastres.kernels.launch import observed_by


@few_examples
@given(problems(), st.booleans(), st.booleans())
def test_conv(problem, prologue, add):
    p = problem
    coef, residual = p.coef() if prologue else None, p.y(4) if add else None
    args = (p.x(), p.w(), p.stride, p.pad, coef, residual)
    y, moments = guarded(conv, *args, rank=p.rank, dilation=p.dilation)
    eager, _ = aten.conv(*args, dilation=p.dilation)
    reference, _ = aten.conv(*exact(args), dilation=p.dilation)
    assert_as_good(y, eager, reference, terms=p.kernel**2 * p.inputs)
    assert moments.count.sum() == y.numel() // p.outputs
    stored = y.double().flatten(0, 2)
    pair = torch.stack([stored.mean(0), stored.var(0, correction=0)])
    assert_as_good(statistics(moments), aten.finalize(aten.moments(y), None, None, 0.0)[:2], pair)


@few_examples
@given(problems(), st.booleans(), st.booleans())
def test_bn_add_relu_conv(problem, projection, wide):
    """The end of a block joined to a pointwise convolution, of more channels than a tile has as well."""
    p = problem._replace(kernel=1, stride=1, pad=(0, 0, 0, 0), outputs=136 if wide else problem.outputs)
    args = (p.x(), p.coef(), p.x(4), random_coef(p.inputs, p.seed + 5) if projection else None, p.w())
    out, y, moments = guarded(bn_add_relu_conv, *args, rank=p.rank)
    eager, reference = aten.bn_add_relu_conv(*args), aten.bn_add_relu_conv(*exact(args))
    assert_as_good((out, y), eager[:2], reference[:2], terms=p.inputs)
    stored = y.double().flatten(0, 2)
    pair = torch.stack([stored.mean(0), stored.var(0, correction=0)])
    assert_as_good(statistics(moments), aten.finalize(aten.moments(y), None, None, 0.0)[:2], pair)


@few_examples
@given(problems(), st.booleans(), st.booleans())
def test_conv_bias_act(problem, add, relu):
    p = problem
    bias = randn(p.outputs, seed=p.seed + 7)
    args = (p.x(), p.w(), bias, p.stride, p.pad, p.y(4) if add else None, relu)
    assert_as_good(
        guarded(conv_bias_act, *args, rank=p.rank, dilation=p.dilation),
        aten.conv_bias_act(*args, dilation=p.dilation),
        aten.conv_bias_act(*exact(args), dilation=p.dilation),
        terms=p.kernel**2 * p.inputs,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_statistics_of_a_large_mean(dtype):
    """Mean 1000 standard deviations from zero: sums of squares would leave nothing of the variance."""
    x = torch.ones(2, 8, 8, 16, dtype=dtype)
    w = torch.full((16, 1, 1, 16), 64.0, dtype=dtype)
    x[..., 0] += randn(2, 8, 8, seed=0).sign().cpu().to(dtype) / 64  # y is 1024 +- 1 but for rounding
    x, w = x.to(randn(1, seed=0).device), w.to(randn(1, seed=0).device)
    y, moments = conv(x, w, 1, (0, 0, 0, 0))
    stored = y.double().flatten(0, 2)
    mean, var = statistics(moments)
    assert (mean - stored.mean(0)).abs().max() < 1e-3
    if dtype == torch.float32:
        assert (var / stored.var(0, correction=0) - 1).abs().max() < 1e-3


def test_the_same_bits_every_time():
    x, w = randn(2, 9, 7, 24, seed=0), randn(40, 3, 3, 24, seed=1)
    runs = [conv(x, w, 2, (1, 1, 1, 1)) for _ in range(2)]
    assert_same_bits(*runs)


def test_nan_passes_the_prologue():
    x, coef = randn(1, 4, 4, 16, seed=0), torch.ones(5, 16, device=randn(1, seed=0).device)
    x[0, 1, 1, 3] = torch.nan
    y, _ = conv(x, randn(16, 1, 1, 16, seed=1), 1, (0, 0, 0, 0), coef)
    assert y[0, 1, 1].isnan().all() and y.isnan().sum() == 16


@pytest.mark.parametrize("outputs", [16, 64])
def test_padding_is_zero_whatever_the_coefficients(outputs):
    """A window of nothing but padding gives 0, where those with a pixel give NaN."""
    x, w = randn(1, 4, 4, 16, seed=0), randn(outputs, 3, 3, 16, seed=1)
    y, _ = conv(x, w, 1, (3, 3, 3, 3), torch.full((5, 16), torch.nan, device=x.device))
    assert (y[0, 0] == 0).all() and (y[0, :, -1] == 0).all() and y[0, 1:-1, 1:-1].isnan().all()


@pytest.mark.parametrize("kernel, moments, sizes", [(3, True, (5, 7, 5, 7)), (3, False, None), (1, True, None)])
def test_sizes_of_images_are_compiled_in_for_training_alone(kernel, moments, sizes):
    """Inference has one kernel for all, and so have pointwise convolutions, which read none."""
    observer = mock.Mock()
    with observed_by(observer):
        conv(randn(1, 5, 7, 20, seed=0), randn(20, kernel, kernel, 20, seed=1), 1, (kernel // 2,) * 4, moments=moments)
    _, _, arguments = observer.launched.call_args.args
    assert arguments[conv_kernel.arg_names.index("SIZES")] == sizes
