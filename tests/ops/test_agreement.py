"""Results of two implementations: rounding is no difference, a wrong value, shape or statistic is."""

import pytest
import torch
from support_flat import aten

from fastres.kernels.types import Moments
from fastres.ops.agreement import coarsest, difference, rounding

LIBRARY = aten
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def layer(dtype, n=4, size=9, cin=24, cout=20, kernel=3):
    """What a convolution and its gradients read: x, coef, w, dz, y, abc, pad."""
    torch.manual_seed(0)
    x, w = torch.randn(n, size, size, cin), torch.randn(cout, kernel, kernel, cin) / (kernel * cin**0.5)
    dz, y = torch.randn(n, size, size, cout), torch.randn(n, size, size, cout)
    coef = aten.finalize(aten.moments(x), torch.rand(cin) + 0.5, torch.randn(cin), 1e-5)
    abc = torch.rand(3, cout)
    return x.to(dtype), coef, w.to(dtype), dz.to(dtype), y.to(dtype), abc, (kernel // 2,) * 4


def tiled(moments: Moments, y, parts):
    """The same statistics in other tiles."""
    rows = y.reshape(-1, y.shape[3]).float().split(-(-y.numel() // y.shape[3] // parts))
    count = torch.tensor([float(len(part)) for part in rows])
    mean = torch.stack([part.mean(0) for part in rows])
    m2 = torch.stack([(part - part.mean(0)).square().sum(0) for part in rows])
    return Moments(count, mean, m2)


def both_ways(dtype):
    """A forward and a joint backward, by this dtype and by rounding fp64's results once; statistics in unlike tiles."""
    x, coef, w, dz, y, abc, pad = layer(dtype)
    here, moments = LIBRARY.conv(x, w, 1, pad, coef)
    exact = LIBRARY.conv(x.double(), w.double(), 1, pad, coef.double(), moments=False)[0].to(dtype)
    arguments = x, coef, w, 1, pad
    dx, sums, dw = LIBRARY.conv_backward(dz, y, abc, *arguments)
    wide = [t.double() for t in (dz, y, abc, x, coef, w)]
    dx2, sums2, dw2 = LIBRARY.conv_backward(*wide, 1, pad)
    parts = torch.tensor([0.25, 0.7, 0.05])[:, None, None] * sums2.sum(0).float()
    return (
        (here, moments, dx, sums, dw),
        (exact, tiled(moments, exact, 5), dx2.to(dtype), parts, dw2.float()),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_is_no_difference(dtype):
    first, other = both_ways(dtype)
    found = difference(first, other, dtype)
    assert found.fault is None and 0 < found.relative < rounding(dtype) / 2
    assert difference(other, first, dtype).fault is None
    assert difference(first, first, dtype) == (0.0, None)


def column(value):
    """The last column of pixels is another one's: a mask that is one off."""
    out = value.clone()
    out[:, :, -1] = value[:, :, -2]
    return out


def a_channel(value):
    out = value.clone()
    out[..., 3] *= 1.5
    return out


def not_written(value):
    out = value.clone()
    out.view(-1)[-5:] = torch.finfo(value.dtype).max / 4
    return out


def not_a_number(value):
    out = value.clone()
    out.view(-1)[7] = float("nan")
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", [0, 2, 4], ids=["y", "dx", "dw"])
@pytest.mark.parametrize("wrong", [column, a_channel, not_written, not_a_number, torch.zeros_like, torch.neg])
def test_a_wrong_tensor_is_found(wrong, place, dtype):
    first, other = both_ways(dtype)
    changed = [*other]
    changed[place] = wrong(other[place])
    assert difference(first, tuple(changed), dtype).fault.startswith(f"result[{place}] is ")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wrong_statistics_are_found(dtype):
    first, other = both_ways(dtype)
    moments, sums = other[1], other[3]
    lost = Moments(*(part[:-1] for part in moments))  # a tile
    spread = moments._replace(m2=moments.m2 * 1.2)
    moved = moments._replace(mean=moments.mean + 0.2 * torch.rand_like(moments.mean))
    for wrong in (lost, spread, moved):
        assert difference(first[1], wrong, dtype).fault is not None
    for wrong in (sums[:1], sums.flip(1), sums * torch.tensor([1.0, 1.2])[:, None], a_channel(sums)):
        assert difference(first[3], wrong, dtype).fault is not None


@pytest.mark.parametrize(
    "other, words",
    [
        (torch.ones(2, 4), r"float32 \[2, 4\] on cpu and not float32 \[2, 3\] on cpu"),
        (torch.ones(2, 3).half(), r"float16 \[2, 3\]"),
        (torch.ones(2, 3, device="meta"), "on meta"),
        (torch.ones(3, 2).T, "laid out otherwise"),
        (None, r"None and not float32 \[2, 3\]"),
        ((torch.ones(2, 3),), "a tuple and not float32"),
    ],
    ids=["shape", "dtype", "device", "layout", "none", "nest"],
)
def test_another_shape_dtype_or_nest_is_found(other, words):
    for first, second in (((torch.ones(2, 3),), (other,)), ((torch.ones(2, 3), None), (other, None))):
        with pytest.raises(AssertionError, match=words):
            fault = difference(first, second, torch.float32).fault
            assert fault is None, fault


def test_results_of_other_lengths_differ():
    one = torch.ones(2)
    assert "a tuple and not a tuple" in difference((one, one), (one,), torch.float32).fault


def test_a_few_gradients_may_fall_on_the_other_side_of_a_relu():
    first = torch.randn(100, 100)
    other = first.clone()
    other[0, :8] = 0
    assert difference(first, other, torch.float32).fault is None
    other[0, :20] = 0
    assert difference(first, other, torch.float32).fault is not None


def test_where_the_first_overflowed_nothing_is_compared():
    first = torch.tensor([1.0, float("inf"), float("nan"), 2.0])
    assert difference(first, torch.tensor([1.0, 7.0, 5.0, 2.0]), torch.float32) == (0.0, None)
    assert difference(first, torch.tensor([1.0, 7.0, 5.0, float("inf")]), torch.float32).fault is not None


def test_zeros_and_the_least_numbers_compare():
    zeros = torch.zeros(64)
    assert difference(zeros, zeros, torch.float32) == (0.0, None)
    assert difference(zeros, zeros + 1e-30, torch.float32).fault is not None
    least = torch.full((64,), 6e-8).half()
    assert difference(least, 2 * least, torch.float16).fault is None


def test_large_tensors_are_compared_in_parts(monkeypatch):
    monkeypatch.setattr("fastres.ops.agreement._CHUNK", 10)
    first = torch.randn(95)
    wrong = first.clone()
    wrong[94] = 5.0
    assert difference(first, first.clone(), torch.float32) == (0.0, None)
    assert difference(first, wrong, torch.float32).fault is not None
    sums = torch.randn(4, 2, 33)
    assert difference(sums, sums.flip(0), torch.float32).fault is None


def test_integers_are_the_same_or_not():
    index = torch.arange(5, dtype=torch.uint8)
    assert difference(index, index.clone(), torch.float32) == (0.0, None)
    assert difference(index, index.flip(0), torch.float32).fault is not None


def test_the_tolerance_is_that_of_the_coarsest_dtype(monkeypatch):
    assert coarsest([torch.ones(1), (None, [torch.ones(1).bfloat16()]), torch.ones(1).half(), 3]) == torch.bfloat16
    assert coarsest([3, torch.arange(2)]) == torch.float32
    monkeypatch.setattr("fastres.ops.agreement.precision", lambda dtype: "ieee")
    full = rounding(torch.float32)
    monkeypatch.setattr("fastres.ops.agreement.precision", lambda dtype: "tf32")
    assert full < rounding(torch.float32) == rounding(torch.float16) < rounding(torch.bfloat16)
