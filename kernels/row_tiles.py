"""Tiles of the kernels that stream over a matrix of rows (pixels) and channels: elementwise passes and row sums.

Both are bound by memory. A tile is 4096 elements, 16 a thread of 8 warps, so that a thread has two 16-byte loads of
each 16-bit tensor in flight; half of it for a pool, which has them from several pixels, and a quarter for its backward,
whose elements are squares of pixels. Its rows are 256 bytes of 16-bit channels where there are as many.
"""

from typing import NamedTuple

from fastres.kernels.geometry import cdiv, power_of_2

ELEMENTS, POOL_ELEMENTS, SQUARE_ELEMENTS, CHANNELS, WARPS = 4096, 2048, 1024, 128, 8
# Programs of a reduction that still fill a large GPU: 132 multiprocessors, 8 each.
_PROGRAMS = 1056
_MOST_TILES = 16


class RowTiles(NamedTuple):
    """How a matrix [rows, channels] is shared out."""

    block_m: int  # rows of a tile
    block_c: int  # channels of a tile
    tiles: int  # tiles that a program goes through, down the rows
    grid: tuple[int, int]  # programs: parts of the rows, parts of the channels

    @property
    def launch(self) -> dict[str, int]:
        """The launch's keyword arguments."""
        return dict(BLOCK_M=self.block_m, BLOCK_C=self.block_c, num_warps=WARPS)


def elementwise(rows: int, channels: int, elements: int = ELEMENTS) -> RowTiles:
    """One tile a program."""
    return _row_tiles(rows, channels, elements, 1)


def reduction(rows: int, channels: int, elements: int = ELEMENTS, least_rows: int = 64) -> RowTiles:
    """Up to 16 tiles a program, fewer where that leaves multiprocessors idle.

    Args:
        least_rows: that a program should sum, so that its row of partial sums is little next to what it read.
    """
    tiles = _MOST_TILES
    while tiles > 1:
        split = _row_tiles(rows, channels, elements, tiles)
        if split.grid[0] * split.grid[1] >= _PROGRAMS or tiles // 2 * split.block_m < least_rows:
            break
        tiles //= 2
    return _row_tiles(rows, channels, elements, tiles)


def _row_tiles(rows: int, channels: int, elements: int, tiles: int) -> RowTiles:
    block_c = power_of_2(channels, 1, CHANNELS)
    block_m = elements // block_c
    return RowTiles(block_m, block_c, tiles, (cdiv(rows, tiles * block_m), cdiv(channels, block_c)))
