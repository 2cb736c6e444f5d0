"""Running statistics moved in place."""

import pytest
import torch
import torch.nn.functional as F
from support_flat import aten

from fastres.ops import Statistics, cpu, running, update_running

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


@pytest.mark.skipif(cpu.unavailable() is not None, reason="no C++ compiler")
@pytest.mark.parametrize("momentum", [0.1, 0.9, 1.0])
def test_one_compiled_call_is_pytorchs_operations(momentum, monkeypatch):
    """With the same bits. Version counters move too, so that autograd notices."""
    batches = [batch(channels, scale) for channels, scale in ((5, 1.0), (3, 10.0), (33, 0.1))]
    used, before = [one for _, one in batches], [torch.rand(2, y.shape[1]) for y, _ in batches]
    ours, theirs = ([t.clone() for t in before] for _ in range(2))
    update_running([t[0] for t in ours], [t[1] for t in ours], used, [momentum] * 3)
    assert [t._version for t in ours] == [2, 2, 2]  # a row each
    monkeypatch.setattr(running.cpu.Running, "move", lambda *_: False)
    update_running([t[0] for t in theirs], [t[1] for t in theirs], used, [momentum] * 3)
    assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize(
    "other",
    [
        torch.rand(5).double(),
        torch.rand(10)[::2],
        torch.nn.Parameter(torch.rand(5), False),
        torch.rand(5, device="meta"),
    ],
    ids=["fp64", "gaps", "a subclass", "another device"],
)
def test_other_tensors_are_left_to_pytorch(other):
    plain, coef = torch.rand(5), torch.rand(5, 5)
    assert not cpu.Running([plain], [other], [1.0]).move([coef], 0.1)
    assert not cpu.Running([other], [plain], [1.0]).move([coef], 0.1)


@pytest.mark.skipif(cpu.unavailable() is not None, reason="no C++ compiler")
@pytest.mark.parametrize("compiled", [True, False])
def test_batches_are_counted(compiled, monkeypatch):
    """By the same call, those of BatchNorms that count; again and again."""
    if not compiled:
        monkeypatch.setattr(running.cpu.Running, "move", lambda *_: False)
    batches = [batch(5), batch(3)]
    counters, means, variances = [torch.tensor(7)], [torch.zeros(5), torch.zeros(3)], [torch.ones(5), torch.ones(3)]
    expected = [(mean.clone(), var.clone()) for mean, var in zip(means, variances)]
    moved = running.Running(means, variances, [24, 24], counters)
    for _ in range(3):
        moved.move([used.coef for _, used in batches], [0.3, 0.3])
        for (y, _), (mean, var) in zip(batches, expected):
            F.batch_norm(y, mean, var, training=True, momentum=0.3)
    assert counters[0].item() == 10 and counters[0]._version == 3
    torch.testing.assert_close(list(zip(means, variances)), expected)


def test_no_number_is_read_of_a_momentum_on_a_device():
    """Of one that equals the others' number either: the host would wait for it."""
    assert running._in_common([0.5, torch.tensor(0.5, device="meta")]) is None
    assert running._in_common([0.5, 0.5]) == 0.5 and running._in_common([0.5, 0.1]) is None
