"""Global average pool."""

import pytest
import torch
from support_fused import assert_as_good_as_eager

from fastres.ops import global_avg_pool
from fastres.ops.global_avg_pool import global_avg_pool_backward, global_avg_pool_forward


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_errs_no_more_than_eager(dtype):
    x = torch.randn(3, 7, 5, 20, dtype=torch.float64)
    assert_as_good_as_eager(global_avg_pool, lambda x: x.mean((1, 2)), (x,), dtype)


def test_gradcheck():
    x = torch.randn(2, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(global_avg_pool, (x,))


def test_opcheck():
    torch.library.opcheck(global_avg_pool_forward, (torch.randn(2, 3, 4, 5),))
    torch.library.opcheck(global_avg_pool_backward, (torch.randn(2, 5), 3, 4))
