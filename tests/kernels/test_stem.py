"""The first layer's convolution over squares of pixels, against fp64 and against the kernels for any window."""

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support_conv import BACKWARDS, exact, statistics
from support_flat import aten
from support_kernels import HALVES, assert_as_good, assert_same_bits, few_examples, guarded, on_gpus_of, randn, seeds

from fastres.kernels.conv import conv
from fastres.kernels.geometry import output_hw
from fastres.kernels.stem import is_stem, spread
from fastres.kernels.wgrad import conv_wgrad

pytestmark = on_gpus_of(9)


def shapes():
    """Batch, size, channels of the image and of the result, side of the window, padding on all four sides."""
    pads = st.tuples(*(st.integers(0, 4) for _ in range(4)))
    sizes = st.tuples(st.integers(1, 3), st.integers(8, 17), st.integers(8, 17))
    return st.tuples(sizes, st.integers(1, 4), st.sampled_from([16, 24, 32, 64]), st.integers(3, 8), pads)


@few_examples
@given(shapes(), st.sampled_from(HALVES), seeds(), st.sampled_from(BACKWARDS))
def test_conv_and_its_weight_gradient(shape, dtype, seed, backward):
    size, cin, cout, kernel, pad = shape
    x, w = randn(*size, cin, seed=seed, dtype=dtype), randn(cout, kernel, kernel, cin, seed=seed + 1) / kernel
    args = x, w.to(dtype), 2, pad
    y, moments = guarded(conv, *args)
    assert_as_good(y, aten.conv(*args)[0], aten.conv(*exact(args))[0], terms=kernel**2 * cin)
    assert moments.count.sum() == y.numel() // cout
    stored = y.double().flatten(0, 2)
    pair = torch.stack([stored.mean(0), stored.var(0, correction=0)])
    assert_as_good(statistics(moments), aten.finalize(aten.moments(y), None, None, 0.0)[:2], pair)
    torch.testing.assert_close(y, conv(*args, rank=1)[0])
    assert_same_bits(conv(*args, moments=False)[0], y)

    dz, made = (randn(*y.shape, seed=seed + i, dtype=dtype) for i in (2, 3))
    abc = None if backward == "none" else randn(3, cout, seed=seed + 4)
    args = dz, made if backward == "trained" else None, abc, x, None, 2, pad, (kernel, kernel)
    dw = guarded(conv_wgrad, *args)
    assert dw.shape == (cout, kernel, kernel, cin) and dw.is_contiguous()
    assert_as_good(dw, aten.conv_wgrad(*args), aten.conv_wgrad(*exact(args)))
    torch.testing.assert_close(dw, conv_wgrad(*args, rank=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", [(7, 5), (4, 7), (5, 8)])
def test_windows_that_are_not_square(kernel):
    x, w, pad = (
        randn(2, 14, 13, 3, seed=0, dtype=HALVES[1]),
        randn(64, *kernel, 3, seed=1, dtype=HALVES[1]),
        (3, 2, 3, 2),
    )
    y, _ = guarded(conv, x, w, 2, pad)
    torch.testing.assert_close(y, conv(x, w, 2, pad, rank=1)[0])
    dz = randn(*y.shape, seed=2, dtype=HALVES[1])
    dw = guarded(conv_wgrad, dz, None, None, x, None, 2, pad, kernel)
    torch.testing.assert_close(dw, conv_wgrad(dz, None, None, x, None, 2, pad, kernel, rank=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("least, most", [(1, 1), (1, 512), (3, 3)])
def test_parts_of_the_pixels(least, most):
    """Whatever their number: of several images, parts begin inside an image and end in another; more than are summed at
    once."""
    x, w, pad = randn(9, 32, 31, 3, seed=0, dtype=HALVES[1]), randn(32, 5, 5, 3, seed=1, dtype=HALVES[1]), (1, 1, 2, 2)
    out = output_hw((32, 31), (5, 5), 2, pad, 1)
    dz = randn(9, *out, 32, seed=2, dtype=HALVES[1])
    with mock.patch.multiple("fastres.kernels.configs", LEAST_STEPS_HELD=least, MOST_STEPS_HELD=most):
        y, moments = guarded(conv, x, w, 2, pad)
        dw = guarded(conv_wgrad, dz, None, None, x, None, 2, pad, (5, 5))
    assert len(moments.count) == -(-9 * out[0] * out[1] // (32 * most)) or most == 512
    torch.testing.assert_close(y, conv(x, w, 2, pad, rank=1)[0])
    other = conv_wgrad(dz, None, None, x, None, 2, pad, (5, 5), rank=1)
    torch.testing.assert_close(dw, other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("pad", [(0, 0), (3, 3), (2, 1)])
def test_spread(channels, pad):
    """Each square's pixels behind one another, zeros outside of the image."""
    x = randn(2, 7, 6, channels, seed=0, dtype=HALVES[1])
    hw = (6, 5)
    whole = torch.zeros(2, 12, 10, 4, dtype=x.dtype, device=x.device)
    h, v = min(7, 12 - pad[0]), min(6, 10 - pad[1])
    whole[:, pad[0] : pad[0] + h, pad[1] : pad[1] + v, :channels] = x[:, :h, :v]
    squares = whole.unflatten(2, (5, 2)).unflatten(1, (6, 2)).permute(0, 1, 3, 2, 4, 5).flatten(3)
    assert_same_bits(guarded(spread, x, hw, pad), squares.contiguous())


def test_nan_of_an_image_reaches_its_own_windows():
    x, w = randn(1, 16, 16, 3, seed=0, dtype=HALVES[1]), randn(32, 5, 5, 3, seed=1, dtype=HALVES[1])
    x[0, 9, 9, 1] = float("nan")
    y, _ = conv(x, w, 2, (1, 1, 2, 2))
    other, _ = conv(x, w, 2, (1, 1, 2, 2), rank=1)
    # A window's last row and column of squares reach a pixel farther than it does, with weights of 0.
    assert (y.isnan() >= other.isnan()).all() and y.isnan().sum() <= 9 * 32 and not y[0, 0].isnan().any()


def test_what_it_does_not_take():
    taken = (3, 64, (7, 7), 2, 1, torch.bfloat16, 90)
    assert is_stem(*taken)
    for place, value in ((0, 5), (1, 72), (2, (9, 7)), (2, (1, 1)), (3, 1), (4, 2), (5, torch.float32), (6, 80)):
        assert not is_stem(*taken[:place], value, *taken[place + 1 :])
