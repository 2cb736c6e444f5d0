"""Device code that several kernels share."""

import pytest
import torch
import triton
import triton.language as tl
from support_kernels import randn

from fastres.kernels.tiles import sum_pixels


@triton.jit
def sums_kernel(x_ptr, out_ptr, BC: tl.constexpr, BM: tl.constexpr, BITS: tl.constexpr, WARPS: tl.constexpr):
    channel = tl.arange(0, BC)
    x = tl.load(x_ptr + tl.arange(0, BM)[None, :] * BC + channel[:, None])
    tl.store(out_ptr + channel, sum_pixels(x, BITS, WARPS))


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize("warps", [0, 1, 2, 4, 16])
@pytest.mark.parametrize(
    "channels, pixels", [(128, 32), (64, 64), (256, 128), (32, 16), (16, 128), (512, 4), (1024, 2)]
)
def test_sums_of_pixels(channels, pixels, bits, warps):
    """Whatever the tile's size: also where warps have pieces of a pixel, or fewer pixels than there are warps."""
    x, out = randn(pixels, channels, seed=warps), torch.full((channels,), torch.nan)
    sums_kernel[(1,)](x, out, BC=channels, BM=pixels, BITS=bits, WARPS=warps)
    torch.testing.assert_close(out, x.sum(0), rtol=0, atol=1e-4)
    sums_kernel[(1,)](x.round(), out, BC=channels, BM=pixels, BITS=bits, WARPS=warps)
    assert torch.equal(out, x.round().sum(0))
