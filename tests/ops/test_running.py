"""Running statistics moved in place."""

import pytest
import torch
import torch.nn.functional as F

from fastres.ops import Statistics, aten, update_running
from fastres.ops.running import update_running_


@pytest.mark.parametrize("momentum", [0.3, torch.tensor(0.3), 0.0, 1.0], ids=str)
def test_is_batch_norms(momentum):
    y, running = torch.randn(2, 3, 4, 5), (torch.rand(5), torch.rand(5))
    expected = [t.clone() for t in running]
    F.batch_norm(y.permute(0, 3, 1, 2), *expected, training=True, momentum=float(momentum))
    update_running(*running, Statistics(aten.finalize(aten.moments(y), None, None, 1e-5), 24), momentum)
    torch.testing.assert_close(list(running), expected)


@pytest.mark.parametrize("momentum", [None, torch.tensor(0.3)], ids=str)
def test_opcheck(momentum):
    torch.library.opcheck(update_running_, (torch.rand(5), torch.rand(5), torch.rand(5, 5), 24, momentum, 0.1))
