"""BatchNorm and ReLU alone."""

import pytest
import torch
from support_fused import assert_as_good_as_eager, cast, eager_bn_relu, random_norm
from support_ops import opcheck

from fastres.ops import Norm, bn_relu


@pytest.mark.parametrize("norm", [{}, dict(gamma=False), dict(frozen=True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_errs_no_more_than_eager(dtype, norm):
    x = torch.randn(3, 9, 7, 24, dtype=torch.float64) * 3 + 1
    assert_as_good_as_eager(lambda x, n: bn_relu(x, n)[0], eager_bn_relu, (x, random_norm(24, **norm)), dtype)


def test_given_statistics_spare_the_pass_over_x():
    x, norm = torch.randn(2, 4, 4, 8), Norm(torch.rand(8), torch.rand(8))
    out, used = bn_relu(x, norm)
    given = torch.cat([used.coef[:2], torch.full((3, 8), float("nan"))])
    torch.testing.assert_close(bn_relu(x, norm, given)[0], out)


def test_gradcheck():
    x, gamma, beta = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 2, 3), (3,), (3,)))
    assert torch.autograd.gradcheck(lambda x, g, b: bn_relu(x, Norm(g, b))[0], (x, gamma, beta))


@pytest.mark.parametrize("frozen", [False, True])
def test_opcheck(frozen):
    x, norm = cast([torch.randn(2, 3, 4, 5), random_norm(5, frozen=frozen)], torch.float32)
    opcheck(lambda: bn_relu(x, norm)[0])
