"""Test-time augmentation: the mean of logits over views, its shares, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastres.errors import FastresError
from fastres.train.evaluate import predict_logits
from fastres.train.views import Views


class Corner(nn.Module):
    """Logits that are an image's first and last pixel."""

    def forward(self, x):
        return torch.stack([x[:, 0, 0, 0], x[:, 0, -1, -1]], 1)


def test_without_views_the_logits_are_the_networks():
    x = torch.randn(3, 1, 4, 5)
    assert torch.equal(predict_logits(Corner(), x, None), Corner()(x))


@pytest.mark.parametrize("shift", [0, 1, 3])
def test_the_mean_is_over_the_views_and_moved_ones_count_half(shift):
    x, net = torch.randn(3, 1, 6, 7), Corner()
    mirrored = (net(x) + net(x.flip(3))) / 2
    expected = mirrored
    if shift:
        padded = F.pad(x, (shift,) * 4, mode="reflect")
        moved = [padded[:, :, :6, :7], padded[:, :, 2 * shift :, 2 * shift :]]
        expected = mirrored / 2 + sum((net(one) + net(one.flip(3))) / 2 for one in moved) / 4
    torch.testing.assert_close(predict_logits(net, x, Views(shift)), expected)


@pytest.mark.parametrize("shift", [0, 2])
def test_shares_are_of_one_whole(shift):
    views = Views(shift)
    shares = [views.first, *(share for share, _ in views.others(torch.zeros(1, 1, 8, 8)))]
    assert sum(shares) == 1 and len(shares) == (6 if shift else 2)


def test_a_shift_leaves_something_of_the_image():
    Views(7).check(8)
    with pytest.raises(FastresError, match="--tta-shift 8 moves images of 8 pixels away: lower it"):
        Views(8).check(8)
