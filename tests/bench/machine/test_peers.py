"""What the peers' steps are put together from."""

import math

import pytest

from bench.machine import peers
from bench.machine.chips import CHIPS, LAUNCH
from bench.roofline import Launch

H100 = CHIPS[90]


def test_convolutions_of_a_network():
    found = peers.convolutions("resnet50", 224, {"num_classes": 1000}, 2)
    assert len(found) == 53
    stem = found[0]
    assert stem == peers.Convolution(2 * 224**2, 2 * 112**2, 3, 64, 49, 2, True)
    assert list(peers.directions(stem)) == ["forward", "wgrad"]
    operations = sum(2 * one.outputs * one.cin * one.cout * one.taps for one in found)
    assert operations == pytest.approx(2 * 2 * 4.09e9, rel=0.01)  # 4.1 GMAC an image


def test_bytes_of_a_convolution():
    dense = peers.Convolution(1000, 1000, 64, 128, 9, 1)
    assert dense.moved == 2 * (1000 * 64 + 1000 * 128 + 64 * 128 * 9)
    skipping = peers.Convolution(4000, 1000, 64, 128, 1, 2)
    assert skipping.moved == 2 * (1000 * 64 + 1000 * 128 + 64 * 128)


def test_other_launches_move_their_bytes_or_take_the_least_time():
    step = [Launch("large", 3_015_000_000, 0), Launch("small", 8, 0, times=2.0), Launch("convolution", 10**9, 10**9)]
    expected = 3_015_000_000 / H100.bandwidth + 2 * peers.TINY + 3 * LAUNCH
    assert math.isclose(peers.streaming_seconds(step, H100), expected)


def test_what_a_fused_step_launches_beside_triton_is_scaled_to_all_blocks():
    small, large = {"loaded": 4, "stored": 4}, {"loaded": 0, "stored": 3_015_000_000}
    first = {"other": [small], "blocks": 1}
    whole = {"other": [small, large, large], "counted": 3, "blocks": 9}
    one, two = peers.TINY + LAUNCH, 3_015_000_000 / H100.bandwidth + LAUNCH
    assert math.isclose(peers.others_seconds({"stages": [[first, whole]]}, H100), 4 * (one + 2 * two) - 3 * one)
