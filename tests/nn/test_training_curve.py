"""Fifty steps: a fused network stays as near to eager PyTorch as eager PyTorch does to itself, re-ordered."""

from support_curve import assert_within_eagers_own_spread


def test_training_curve_is_within_eagers_own_spread():
    assert_within_eagers_own_spread()
