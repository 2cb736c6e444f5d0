"""How kernels share out a matrix of rows and channels."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support_kernels import few_examples

from fastres.kernels.row_tiles import POOL_ELEMENTS, elementwise, reduction


@few_examples
@given(st.integers(1, 10**7), st.integers(1, 3000))
def test_the_tiles_cover_the_matrix(rows, channels):
    """Every part of the grid has work and nothing is left over."""
    for split in (
        elementwise(rows, channels),
        reduction(rows, channels),
        reduction(rows, channels, POOL_ELEMENTS),
        reduction(rows, channels, least_rows=256),
    ):
        height, width = split.tiles * split.block_m, split.block_c
        assert split.grid[0] * height >= rows > (split.grid[0] - 1) * height
        assert split.grid[1] * width >= channels > (split.grid[1] - 1) * width


@pytest.mark.parametrize("rows, channels", [(256 * 56 * 56, 64), (256 * 14 * 14, 1024), (32 * 7 * 7, 2048)])
def test_partial_sums_are_little_and_programs_many(rows, channels):
    """Two fp32 sums a program and channel against four tensors of 16 bits; four programs a multiprocessor."""
    split = reduction(rows, channels)
    assert split.grid[0] * 8 < 0.02 * rows * 8
    assert split.grid[0] * split.grid[1] >= 132
