"""Triton's convolutions in each of the tile configurations that are timed against each other; needs a GPU."""

import pytest
import torch

from fastres.kernels import conv
from fastres.ops.backends.timed import RANKS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="compiled kernels need a CUDA device")
LAYERS = {"1x1": (256, 64, 1), "3x3": (64, 64, 3), "1x1 wide": (64, 256, 1)}


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("layer", LAYERS)
def test_conv(layer, rank, setting, measured):
    inputs, outputs, kernel = LAYERS[layer]
    x = torch.randn(64, 56, 56, inputs, device=setting.device).to(setting.dtype)
    w = torch.randn(outputs, kernel, kernel, inputs, device=setting.device).to(setting.dtype)
    coef = torch.rand(5, inputs, device=setting.device)
    measured(lambda: conv(x, w, 1, (kernel // 2,) * 4, coef=coef, rank=rank))
