"""Statistics, coefficients of both directions and running statistics, against fp64."""

import pytest
import torch
from hypothesis import given
from support_flat import aten
from support_kernels import (
    assert_as_good,
    assert_same_bits,
    dtypes,
    few_examples,
    guarded,
    nhwc_shapes,
    randn,
    random_coef,
    seeds,
)

from fastres.kernels import batch_norm
from fastres.kernels.batch_norm import MOST_TILES
from fastres.kernels.types import Moments


def widened(*values):
    """fp64 of what is floating, the rest as it is."""
    return [v.double() if isinstance(v, torch.Tensor) else v for v in values]


def exact_moments(y):
    """Mean and biased variance of y [N, H, W, C], fp64."""
    rows = y.double().flatten(0, 2)
    return torch.stack([rows.mean(0), rows.var(0, correction=0)])


def random_moments(tiles, channels, seed):
    """Statistics of tiles of 1 to 128 rows."""
    count = torch.randint(1, 129, (tiles,), generator=torch.Generator().manual_seed(seed)).float()
    mean, spread = randn(2, tiles, channels, seed=seed + 1)
    return Moments(count.to(mean.device), mean, spread.square() * count.to(mean.device)[:, None])


@few_examples
@given(nhwc_shapes(), dtypes(), seeds())
def test_moments(shape, dtype, seed):
    y = randn(*shape, seed=seed, dtype=dtype)
    moments = guarded(batch_norm.moments, y)
    assert moments.count.sum() == y.numel() // shape[3]
    ours, eager = (aten.finalize(m, None, None, 0.0)[:2] for m in (moments, aten.moments(y)))
    assert_as_good(ours, eager, exact_moments(y))


@pytest.mark.parametrize("shape", [(2, 25, 15, 72), (1, 60, 50, 3)], ids=str)
def test_moments_of_many_tiles(shape):
    y = randn(*shape, seed=0) + 3
    moments = guarded(batch_norm.moments, y)
    assert len(moments.count) > 1
    assert_as_good(aten.finalize(moments, None, None, 0.0)[:2], exact_moments(y).float(), exact_moments(y))


@pytest.mark.parametrize("shape", [(2, 30, 17, 40), (1, 1, 2, 3)], ids=str)
def test_a_large_mean_keeps_the_variance(shape):
    """Mean 1000 standard deviations away: sums of squares would leave nothing of the variance."""
    y = randn(*shape, seed=0) + 1000
    coef = guarded(batch_norm.finalize, guarded(batch_norm.moments, y), None, None, 1e-9)
    mean, var = exact_moments(y)
    assert (coef[0] - mean).abs().max() < 1e-3
    assert (coef[1] / var - 1).abs().max() < 1e-3


TILES = [1, 3, 130, 700, MOST_TILES + 700]  # the last are merged by two launches


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("affine", [True, False])
def test_finalize(tiles, affine):
    moments = random_moments(tiles, 12, seed=tiles)
    gamma, beta = randn(2, 12, seed=1) if affine else (None, None)
    arguments = moments, gamma, beta, 1e-3
    exact = aten.finalize(Moments(*widened(*moments)), *widened(gamma, beta), 1e-3)
    assert_as_good(guarded(batch_norm.finalize, *arguments), aten.finalize(*arguments), exact)


@pytest.mark.parametrize("tiles", [600, MOST_TILES + 1])
def test_finalize_takes_tiles_whose_means_are_far_apart_from_zero(tiles):
    moments = random_moments(tiles, 5, seed=0)
    far = moments._replace(mean=moments.mean + 1000)
    exact = aten.finalize(Moments(*widened(*far)), None, None, 1e-9)
    coef = guarded(batch_norm.finalize, far, None, None, 1e-9)
    assert (coef[1] / exact[1] - 1).abs().max() < 1e-6


@pytest.mark.parametrize("outlier", [0, 300])
def test_finalize_takes_a_tile_that_is_far_from_the_others(outlier):
    """The first, from which deviations are counted, or another: what cancels is as in fp64."""
    moments = random_moments(600, 5, seed=0)
    moments.mean[outlier] += 1e4
    exact = aten.finalize(Moments(*widened(*moments)), None, None, 1e-9)
    coef = guarded(batch_norm.finalize, moments, None, None, 1e-9)
    assert (coef[:2] / exact[:2] - 1).abs().max() < 1e-5


def test_no_variance_is_below_zero():
    """Equal tiles, whose common M2 is 0 by a difference."""
    moments = Moments(torch.full((600,), 128.0), torch.full((600, 3), 0.1), torch.zeros(600, 3))
    coef = guarded(
        batch_norm.finalize, Moments(*(part.to(randn(1, seed=0).device) for part in moments)), None, None, 1.0
    )
    assert (coef[1] == 0).all() and (coef[0] == torch.tensor(0.1)).all()


@pytest.mark.parametrize("channels", [3, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_running_coef(channels, dtype):
    mean, var, gamma, beta = randn(4, channels, seed=0).to(dtype)
    for arguments in ((mean, var.abs(), gamma, beta, 1e-5), (mean, var.abs(), None, beta, 1e-5)):
        exact = aten.running_coef(*widened(*arguments))
        assert_as_good(guarded(batch_norm.running_coef, *arguments), exact.float(), exact)


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("training", [True, False])
def test_bn_backward_coef(tiles, training):
    sums, coef = randn(tiles, 2, 12, seed=0), random_coef(12, seed=1)
    arguments = sums, coef, 77 * tiles, training
    abc, dgamma, dbeta = guarded(batch_norm.bn_backward_coef, *arguments)
    exact = aten.bn_backward_coef(*widened(*arguments))
    assert_as_good((abc, dgamma, dbeta), aten.bn_backward_coef(*arguments), exact)
    assert training or not abc[1:].any()


@pytest.mark.parametrize("tiles", [1, 700, MOST_TILES + 1])
def test_sums_that_cancel_keep_what_is_left(tiles):
    """Of terms 10 million times as large as their sum: plain fp32 sums would leave nothing of it."""
    terms = 1e7 * randn(tiles, 2, 3, seed=0)
    sums = torch.cat([terms, -terms, randn(tiles, 2, 3, seed=1)]).repeat_interleave(2, 0)
    exact = sums.double().sum(0)
    _, dgamma, dbeta = guarded(batch_norm.bn_backward_coef, sums, random_coef(3, seed=2), 99, True)
    assert (torch.stack([dbeta, dgamma]) - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("tiles", [40, 700])
def test_what_is_not_finite_is_summed_as_by_pytorch(tiles):
    sums = randn(tiles, 2, 4, seed=0)
    sums[3, 0, 1] = sums[5, 1, 2] = float("inf")
    sums[7, 1, 3] = float("nan")
    _, dgamma, dbeta = guarded(batch_norm.bn_backward_coef, sums, random_coef(4, seed=1), 99, True)
    exact = sums.sum(0)
    for ours, theirs in ((dbeta, exact[0]), (dgamma, exact[1])):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4, equal_nan=True), (ours, theirs)


def test_the_same_bits_from_run_to_run():
    y, gamma, sums = randn(2, 30, 17, 40, seed=0), randn(40, seed=1), randn(700, 2, 40, seed=2)
    first, second = (
        (
            *batch_norm.moments(y),
            batch_norm.finalize(random_moments(700, 40, seed=3), gamma, None, 1e-5),
            *batch_norm.bn_backward_coef(sums, random_coef(40, seed=4), 99, True),
        )
        for _ in range(2)
    )
    assert_same_bits(first, second)
