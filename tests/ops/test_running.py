"""Running statistics moved in place."""

import pytest
import torch
import torch.nn.functional as F
from support_flat import aten

from fastres.ops import Statistics, update_running

MOMENTA = [0.3, torch.tensor(0.3), torch.tensor(0.3).double(), 0.0, 1.0]


def batch(channels: int, scale: float = 1.0) -> tuple[torch.Tensor, Statistics]:
    """[N, C, H, W] and its statistics."""
    y = torch.randn(2, 3, 4, channels) * scale
    return y.permute(0, 3, 1, 2), Statistics(aten.finalize(aten.moments(y), None, None, 1e-5), 24)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("momentum", MOMENTA, ids=str)
def test_is_batch_norms(momentum, dtype):
    y, used = batch(5)
    before = torch.rand(2, 5).to(dtype)
    running, expected = before.clone(), before.double()
    F.batch_norm(y.double(), *expected, training=True, momentum=float(momentum))
    update_running([running[0]], [running[1]], [used], [momentum])
    torch.testing.assert_close(running, expected.to(dtype))
    if momentum == 0.0:
        assert torch.equal(running, before)
    if momentum == 1.0:
        assert torch.equal(running[0], used.coef[0].to(dtype))


def test_several_at_once_are_each_by_itself():
    batches = [batch(channels, scale) for channels, scale in ((5, 1.0), (3, 10.0), (8, 0.1))]
    means, variances = ([torch.rand(y.shape[1]) for y, _ in batches] for _ in range(2))
    momenta = [0.1, 0.5, torch.tensor(0.9)]
    expected = [[t.clone() for t in tensors] for tensors in (means, variances)]
    for index, (y, _) in enumerate(batches):
        F.batch_norm(y, expected[0][index], expected[1][index], training=True, momentum=float(momenta[index]))
    update_running(means, variances, [used for _, used in batches], momenta)
    torch.testing.assert_close([means, variances], expected)
    update_running([], [], [], [])
    with pytest.raises(ValueError, match="shorter"):
        update_running(means, variances[:2], [used for _, used in batches], momenta)
