"""Drawn convolutions of random values, for the tests of the convolution kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import pytest
import support_amx
import torch
from hypothesis import strategies as st
from support_flat import aten
from support_kernels import dtypes, randn, random_coef, seeds
from torch import Tensor

from fastres.kernels.geometry import Pad, extent, output_hw
from fastres.kernels.types import Moments
from fastres.ops.cpu import native, tiles

CHANNELS = (1, 3, 8, 16, 20, 24, 40, 64, 72)  # less than a tensor core takes, tails, exactly a tile, more than one
BACKWARDS = ("none", "frozen", "trained")  # which BatchNorm's backward a gradient goes through first


@contextmanager
def taken_tiles(name: str) -> Iterator[None]:
    """Inside, convolutions in bf16 are of that form of tiles, AMX computed by `support_amx` where the CPU has none; the
    test is skipped where it lacks another."""
    number, best = tiles.FORMS[name], native.answer("form")
    emulates = name == "amx" and best == tiles.FORMS["avx512"] and support_amx.library() is not None
    if number > best and not emulates:
        pytest.skip(f"the CPU has no {name}")
    with mock.patch.object(tiles, "form", lambda: number), support_amx.emulated() if emulates else nullcontext():
        yield


class Problem(NamedTuple):
    """A convolution; tensors of the same ``offset`` are the same."""

    n: int
    hw: tuple[int, int]
    inputs: int
    outputs: int
    kernel: int
    stride: int
    pad: Pad
    dtype: torch.dtype
    seed: int
    rank: int
    dilation: int = 1

    def x(self, offset: int = 0) -> Tensor:
        """Like the input: [N, H, W, inputs]."""
        return randn(self.n, *self.hw, self.inputs, seed=self.seed + offset, dtype=self.dtype)

    def y(self, offset: int) -> Tensor:
        """Like the output: [N, OH, OW, outputs]."""
        hw = output_hw(self.hw, (self.kernel, self.kernel), self.stride, self.pad, self.dilation)
        return randn(self.n, *hw, self.outputs, seed=self.seed + offset, dtype=self.dtype)

    def w(self) -> Tensor:
        """Weight [outputs, kernel, kernel, inputs] of variance 2 / fan-in."""
        shape = (self.outputs, self.kernel, self.kernel, self.inputs)
        return (randn(*shape, seed=self.seed + 1) * (2 / (self.inputs * self.kernel**2)) ** 0.5).to(self.dtype)

    def coef(self) -> Tensor:
        """Coefficients [5, inputs] of a BatchNorm."""
        return random_coef(self.inputs, self.seed + 2)

    def abc(self) -> Tensor:
        """BatchNorm's backward [3, outputs]."""
        return randn(3, self.outputs, seed=self.seed + 3)

    def batch_norm_backward(self, kind: str, offset: int) -> tuple[Tensor | None, Tensor | None]:
        """y and abc of a kind of `BACKWARDS`."""
        return {"none": (None, None), "frozen": (None, self.abc()), "trained": (self.y(offset), self.abc())}[kind]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """1x1, 3x3, 5x5 and 7x7 kernels, strides 1 to 3, dilations 1 to 4, even and uneven padding, odd sizes, batch 1, all
    configurations."""
    kernel = draw(st.sampled_from([1, 1, 3, 3, 3, 5, 7]))
    dilation = draw(st.sampled_from([1, 1, 2, 3, 4])) if kernel in (1, 3) else draw(st.integers(1, 2))
    reach = extent(kernel, dilation) - 1
    pads = [(reach // 2,) * 4, (0, reach // 2, reach // 2, reach), (kernel // 2,) * 4]
    pad = draw(st.sampled_from(pads)) if kernel > 1 else (0, 0, 0, 0)
    heights, widths = (st.integers(max(1, reach + 1 - a - b), 11) for a, b in ((pad[0], pad[2]), (pad[1], pad[3])))
    n, *hw = draw(st.tuples(st.integers(1, 3), heights, widths).filter(lambda s: s[0] * s[1] * s[2] <= 150))
    inputs, outputs = draw(st.sampled_from(CHANNELS)), draw(st.sampled_from(CHANNELS))
    stride, rank = draw(st.sampled_from([1, 1, 2, 2, 3])), draw(st.integers(0, 2))
    return Problem(n, tuple(hw), inputs, outputs, kernel, stride, pad, draw(dtypes()), draw(seeds()), rank, dilation)


def statistics(moments: Moments) -> Tensor:
    """Mean and variance [2, C] of the tiles together."""
    return aten.finalize(moments, None, None, 0.0)[:2].float()


def exact(value: Any) -> Any:
    """fp64 of the tensors in a nest of tuples."""
    if isinstance(value, Tensor):
        return value.double()
    return tuple(map(exact, value)) if isinstance(value, tuple) else value
