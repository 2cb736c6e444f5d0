"""Inference convolution."""

import pytest
import torch
import torch.nn.functional as F
from support_fused import FLOOR, random_weight, relative_error

from fastres.ops import Conv, conv_bias_act
from fastres.ops.conv_bias_act import conv_bias_act_forward


@pytest.mark.parametrize("pad", [(1, 1, 1, 1), (0, 0, 1, 1)], ids=str)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_equals_fp64_eager(dtype, relu, residual, pad):
    weight, bias = random_weight(6, 9, 3).to(dtype), torch.randn(9)
    x, added = torch.randn(2, 8, 7, 6).to(dtype), torch.randn(2, 4, 4 if pad[1] else 3, 9).to(dtype)
    top, left, bottom, right = pad
    padded = F.pad(x.double().permute(0, 3, 1, 2), (left, right, top, bottom))
    exact = F.conv2d(padded, weight.double(), bias.double(), 2).permute(0, 2, 3, 1)
    exact = exact + added.double() if residual else exact
    out = conv_bias_act(x, Conv(weight, 2, pad), bias, added if residual else None, relu)
    assert relative_error(out, F.relu(exact) if relu else exact) <= FLOOR[dtype]


def test_opcheck():
    x, w, bias, added = torch.randn(2, 5, 5, 3), torch.randn(4, 3, 3, 3), torch.randn(4), torch.randn(2, 5, 5, 4)
    for residual in (added, None):
        torch.library.opcheck(conv_bias_act_forward, (x, w, bias, [1, *[1, 1, 1, 1], 1], residual, True))
