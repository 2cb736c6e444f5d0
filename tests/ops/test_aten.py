"""The ATen primitives where the operations' tests do not look: accuracy of statistics, and the pieces one by one."""

import pytest
import torch
import torch.nn.functional as F
from support_flat import aten
from support_fused import relative_error


@pytest.mark.parametrize("shape", [(8, 56, 56, 64), (2, 7, 7, 512), (1, 1, 2, 3)], ids=str)
def test_statistics_of_a_large_mean(shape):
    """Mean 1000 standard deviations away: sums of squares would leave nothing of the variance."""
    y = torch.randn(shape) + 1000
    coef = aten.finalize(aten.moments(y), None, None, 0.0)
    exact = y.double().flatten(0, 2)
    assert (coef[0] - exact.mean(0)).abs().max() < 1e-3
    assert (coef[1] / exact.var(0, correction=0) - 1).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_statistics_of_half_precision_are_those_of_the_stored_values(dtype):
    y = torch.randn(4, 30, 30, 16).to(dtype)
    coef = aten.finalize(aten.moments(y), None, None, 0.0)
    exact = y.double().flatten(0, 2)
    assert coef.dtype == torch.float32
    assert relative_error(coef[0], exact.mean(0)) < 1e-5
    assert relative_error(coef[1], exact.var(0, correction=0)) < 1e-5


def test_merged_tiles_are_the_whole():
    y = torch.randn(3, 200, 200, 32) * torch.arange(1, 4).view(3, 1, 1, 1) + 5
    tiled = aten.moments(y)
    assert len(tiled.count) > 1 and tiled.count.sum() == 120000 and tiled.count[-1] < tiled.count[0]
    coef = aten.finalize(tiled, None, None, 1e-5)
    assert relative_error(coef[1], y.double().flatten(0, 2).var(0, correction=0)) < 1e-6


@pytest.mark.parametrize("pad", [(1, 1, 1, 1), (0, 0, 1, 1), (2, 1, 0, 0)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_dgrad_and_wgrad_alone(stride, pad):
    x, w = torch.randn(2, 7, 6, 4).double(), torch.randn(5, 3, 3, 4).double()
    x.requires_grad_(), w.requires_grad_()
    top, left, bottom, right = pad
    padded = F.pad(x, (0, 0, left, right, top, bottom)).permute(0, 3, 1, 2)
    y = F.conv2d(padded, w.permute(0, 3, 1, 2), stride=stride).permute(0, 2, 3, 1)
    dy = torch.randn_like(y)
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    x, w = x.detach(), w.detach()
    residual = torch.randn_like(x)
    got, sums = aten.conv_dgrad(dy.contiguous(), None, None, w, stride, pad, (7, 6), residual=residual)
    assert sums is None
    torch.testing.assert_close(got, dx + residual)
    torch.testing.assert_close(aten.conv_wgrad(dy.contiguous(), None, None, x, None, stride, pad, (3, 3)), dw)


def test_pool_index_is_the_winning_tap():
    y = torch.tensor([[0.0, 3, 1, 2], [5, 4, 2, 9]]).view(1, 2, 4, 1)
    identity = torch.tensor([[0.0], [1], [1], [1], [0]])
    out, index = aten.bn_relu_max_pool(y, identity, 2, 2, (0, 0, 0, 0))
    assert out.flatten().tolist() == [5, 9] and index.flatten().tolist() == [2, 3]
    dz, _ = aten.bn_relu_max_pool_backward(torch.ones_like(out), index, y, identity, 2, 2, (0, 0, 0, 0))
    assert dz.flatten().tolist() == [0, 0, 0, 0, 1, 0, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("residual", [False, True])
def test_the_gradient_in_front_of_batchnorm_is_rounded_once(dtype, residual):
    """Of a constant channel it is A*dz + C, its sum 0: C rounded by itself would err alike at every pixel."""
    dz, y, added = (
        torch.randn(8, 16, 16, 4).to(dtype),
        torch.zeros(8, 16, 16, 4, dtype=dtype),
        torch.randn(8, 16, 16, 4),
    )
    added = added.to(dtype) if residual else None
    abc = torch.tensor([[300.0] * 4, [7.0] * 4, [0.013, 1.03, 10.3, 103.3]])
    exact = aten.bn_backward_apply(dz.double(), y.double(), abc.double(), None if added is None else added.double())
    ours = aten.bn_backward_apply(dz, y, abc, added)
    assert ours.dtype == dtype and torch.equal(ours, exact.to(dtype))
