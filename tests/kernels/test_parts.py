"""Sums of a weight gradient's parts: alone, and in the launches of BatchNorm's coefficients."""

from unittest import mock

import pytest
import torch
from support_kernels import assert_as_good, assert_same_bits, guarded, randn, random_coef

from fastres.kernels import batch_norm, parts
from fastres.kernels.geometry import cdiv
from fastres.kernels.parts import joining, sum_tile, total


def coefficients(tiles=40, channels=12):
    return batch_norm.bn_backward_coef(randn(tiles, 2, channels, seed=1), random_coef(channels, seed=2), 99, True)


SHAPES = [(2, (3, 1, 1, 5)), (16, (8, 3, 3, 8)), (37, (4, 3, 3, 20)), (150, (8, 3, 3, 3)), (300, (32, 3, 3, 3))]


@pytest.mark.parametrize("count, shape", SHAPES, ids=str)
def test_total(count, shape):
    given = randn(count, *shape, seed=0)
    assert_as_good(guarded(total, given), given.sum(0), given.double().sum(0))


@pytest.mark.parametrize("warps", [4, 16])
@pytest.mark.parametrize("count", [2, 16, 29, 391])
@pytest.mark.parametrize("size", [27, 1728, 36864, 4718592])
def test_tiles_fill_a_gpu_or_have_all_parts(count, size, warps):
    """A tile is as many elements for each thread; a row of it is a sector at least."""
    rows, columns = sum_tile(count, size, warps)
    assert rows * columns == 16 * 32 * warps and columns >= 8
    assert rows < 2 * count
    assert cdiv(size, columns) >= 128 or rows >= count or columns == 8
    assert rows <= 16 or cdiv(size, 2 * columns) < 128  # no taller than that takes


def test_a_single_part_is_the_sum():
    given = randn(1, 4, 1, 1, 4, seed=0)
    assert total(given).data_ptr() == given.data_ptr()


@pytest.mark.parametrize("tiles", [40, 700])
@pytest.mark.parametrize("size", [20, 7000])
def test_a_sum_joins_the_coefficients_launch(tiles, size):
    """With the bits that both have alone; no launch of its own is left."""
    given, alone = randn(19, size, 1, 1, 1, seed=0), coefficients(tiles)

    def joined():
        with joining():
            out = total(given)
            return out, *coefficients(tiles)

    with mock.patch.object(parts, "_launch") as launch:
        ours, *others = guarded(joined)
    assert not launch.called
    assert_same_bits(ours, total(given))
    assert_same_bits(others, alone)


def test_sums_wait_in_order_and_no_longer_than_the_end():
    given = [randn(3, 5, 1, 1, 4, seed=seed) for seed in range(4)]
    with joining():
        sums = [total(one) for one in given[:2]]
        coefficients()
        sums += [total(given[2])]
        with joining(False):  # as a candidate that is timed
            sums += [total(given[3])]
            assert_same_bits(sums[3], given[3].sum(0))
        coefficients()
        assert_same_bits(sums[:2], [one.sum(0) for one in given[:2]])
    assert_as_good(sums, [one.sum(0) for one in given], [one.double().sum(0) for one in given])


def test_after_an_error_nothing_waits():
    with pytest.raises(KeyError), mock.patch.object(parts, "_launch") as launch, joining():
        total(randn(3, 5, 1, 1, 4, seed=0))
        raise KeyError
    assert not launch.called
    assert parts.waiting() == (None, None)


def test_threads_do_not_share_what_waits():
    from threading import Thread

    seen = []
    with joining():
        total(torch.ones(2, 3, 1, 1, 3, device=randn(1, seed=0).device))
        thread = Thread(target=lambda: seen.append(parts.waiting()))
        thread.start()
        thread.join()
    assert seen == [(None, None)]
