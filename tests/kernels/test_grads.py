"""Both gradients of a pointwise convolution in one kernel, against fp64 and against a kernel for each."""

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support_conv import BACKWARDS, exact
from support_flat import aten
from support_kernels import (
    HALVES,
    assert_as_good,
    assert_same_bits,
    device,
    few_examples,
    guarded,
    on_gpus_of,
    randn,
    random_coef,
    seeds,
)

from fastres.kernels.configs import Config, grads_configs, steps_of
from fastres.kernels.dgrad import conv_dgrad
from fastres.kernels.grads import conv_grads, is_joint
from fastres.kernels.parts import joining, waiting
from fastres.kernels.wgrad import conv_wgrad

pytestmark = on_gpus_of(8, 9, 12)


def arguments(n, hw, cin, cout, dtype, seed, backward, below, add):
    """dz, y, abc, w, x, coef, mask, residual."""
    dz, y = (randn(n, *hw, cout, seed=seed + i, dtype=dtype) for i in (0, 1))
    abc = None if backward == "none" else randn(3, cout, seed=seed + 2)
    w = (randn(cout, 1, 1, cin, seed=seed + 3) * (2 / cin) ** 0.5).to(dtype)
    x, mask, residual = (randn(n, *hw, cin, seed=seed + i, dtype=dtype) for i in (4, 5, 6))
    coef = None if below == "nothing" else random_coef(cin, seed + 7)
    ends = mask.relu() if below == "end of a block" else None
    return dz, y if backward == "trained" else None, abc, w, x, coef, ends, residual if add else None


def separately(function, weights, given):
    """dx, sums and dw by a function for each gradient."""
    dz, y, abc, w, x, coef, mask, residual = given
    below = None if coef is None else (x, coef)
    dx, sums = function(dz, y, abc, w, 1, (0,) * 4, tuple(dz.shape[1:3]), below, residual, mask)
    read = (x, coef) if mask is None else (mask, None)
    return dx, None if sums is None else sums.double().sum(0).float(), weights(dz, y, abc, *read, 1, (0,) * 4, (1, 1))


@few_examples
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 11), st.integers(1, 11)).filter(lambda s: s[0] * s[1] * s[2] <= 150),
    st.sampled_from([16, 24, 40, 64, 72, 136]),
    st.sampled_from([16, 20, 64, 72, 130]),
    st.sampled_from(HALVES),
    seeds(),
    st.sampled_from(BACKWARDS),
    st.sampled_from(["nothing", "norm", "end of a block"]),
    st.booleans(),
    st.integers(0, 1),
)
def test_conv_grads(size, cin, cout, dtype, seed, backward, below, add, rank):
    cin = cin if is_joint(cin, cout, dtype, device()) else 72
    given = arguments(size[0], size[1:], cin, cout, dtype, seed, backward, below, add)
    dx, sums, dw = guarded(conv_grads, *given, rank=rank)
    eager = separately(aten.conv_dgrad, aten.conv_wgrad, given)
    reference = separately(aten.conv_dgrad, aten.conv_wgrad, exact(given))
    assert_as_good(dx, eager[0], reference[0], terms=cout)
    assert_as_good(dw, eager[2], reference[2])
    assert dw.is_contiguous()
    if sums is not None:  # of the stored gradient, whose roundings they carry
        total = sums.double().sum(0).float()
        assert_as_good(total, eager[1], reference[1].double(), rounding=dtype, terms=cout)


@pytest.mark.parametrize("below", ["nothing", "norm", "end of a block"])
@pytest.mark.parametrize("least, most, parts", [(1, 1, 23), (1, 512, 23), (4, 512, 6), (8, 8, 3), (64, 512, 1)])
def test_parts_of_the_pixels(least, most, parts, below):
    """Whatever their number, with a last one that is shorter than the others: what a kernel for each gradient finds."""
    given = arguments(1, (31, 23), 72, 64, torch.bfloat16, 0, "trained", below, True)
    with mock.patch.multiple("fastres.kernels.configs", LEAST_STEPS_HELD=least, MOST_STEPS_HELD=most):
        dx, sums, dw = guarded(conv_grads, *given)
        assert_same_bits((dx, sums, dw), conv_grads(*given))
    other = separately(conv_dgrad, conv_wgrad, given)
    torch.testing.assert_close(dx, other[0])
    torch.testing.assert_close(dw, other[2], rtol=1e-5, atol=1e-4)
    if sums is not None:
        assert len(sums) == parts
        torch.testing.assert_close(sums.double().sum(0).float(), other[1], rtol=1e-3, atol=1e-3)


def test_what_is_not_finite_stays():
    """A NaN and an infinity of a gradient reach their own pixel of dx and their channel of dw; in a block's end too."""
    for below in ("norm", "end of a block"):
        dz, y, abc, w, x, coef, mask, residual = arguments(1, (6, 6), 64, 64, torch.bfloat16, 3, "frozen", below, True)
        dz[0, 0, 0, 5], dz[0, 0, 1, 7] = float("nan"), float("inf")
        dx, sums, dw = conv_grads(dz, y, abc, w, x, coef, mask, residual)
        other = separately(conv_dgrad, conv_wgrad, (dz, y, abc, w, x, coef, mask, residual))
        assert torch.equal(dx.isfinite(), other[0].isfinite()) and not dx[0, 0, 0].isfinite().all()
        assert torch.equal(sums.sum(0).isfinite(), other[1].isfinite())
        assert torch.equal(dw.isfinite(), other[2].isfinite()) and dw[5].isnan().all() and dw[6].isfinite().all()


def test_pixels_behind_the_last_have_no_gradient():
    """C of BatchNorm's backward, which is all that dy would be there, does not reach dw."""
    dz = torch.zeros(1, 1, 5, 64, dtype=torch.bfloat16, device=device())
    abc = torch.stack([torch.ones(64), torch.zeros(64), torch.full((64,), 3.0)]).to(dz.device)
    w, coef = torch.zeros(64, 1, 1, 64, dtype=dz.dtype, device=dz.device), torch.ones(5, 64, device=dz.device)
    _, _, dw = conv_grads(dz, dz, abc, w, torch.ones_like(dz), coef)
    assert torch.equal(dw, torch.full_like(dw, 5 * 3.0 * 2.0))


def test_channels_without_a_tile_are_refused():
    known = device()
    assert is_joint(64, 256, torch.bfloat16, known) and is_joint(2048, 128, torch.float16, known)
    for cin, cout, dtype in ((64, 64, torch.float32), (8, 64, HALVES[0]), (64, 8, HALVES[0]), (64, 264, HALVES[0])):
        assert not is_joint(cin, cout, dtype, known)
        dz, x = randn(1, 2, 2, cout, seed=0, dtype=dtype), randn(1, 2, 2, cin, seed=1, dtype=dtype)
        with pytest.raises(ValueError, match=f"{cin} to {cout} channels in {dtype}"):
            conv_grads(dz, None, None, randn(cout, 1, 1, cin, seed=2, dtype=dtype), x)
    dz = randn(1, 2, 2, 64, seed=0, dtype=HALVES[0])
    with pytest.raises(ValueError, match="a mask is the end of a block"):
        conv_grads(dz, None, None, randn(64, 1, 1, 64, seed=2, dtype=HALVES[0]), dz, mask=dz)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("cin", [16, 64, 96, 512])
@pytest.mark.parametrize("cout", [16, 96, 128, 256])
def test_a_program_holds_what_stays(cin, cout, arch):
    """Accumulators within the registers that a thread may have, with many for the rest."""
    for sums, masked in ((False, False), (True, False), (True, True)):
        configs = grads_configs(cin, cout, torch.bfloat16, arch, sums, masked)
        held = cout < 256 or cin <= 128 if arch == 90 else cout <= 64 and arch == 80
        assert bool(configs) == held and configs == list(dict.fromkeys(configs))
        for one in configs:
            threads = 32 * one.num_warps
            kept = one.block_n * one.block_k + one.block_n * one.block_m * (3 if sums else 1)
            assert one.block_k >= cout and kept / threads <= 0.6 * one.most_registers
    assert not any(grads_configs(cin, cout, torch.bfloat16, arch) for arch in (75, 86, 100, 0))


def test_programs_fill_a_gpu_once():
    config = Config(32, 64, 256, 8, 4, 255)
    assert steps_of(802816, 1, config) == 191 and -(-802816 // (32 * 191)) == 132
    assert steps_of(100, 1, config) == 8 and steps_of(10**9, 2, config) == 512
    assert steps_of(50176, 300, config) == 512  # more groups than multiprocessors: no less than one part at a time


def test_parts_are_left_to_a_later_launch():
    """As those of a weight gradient alone."""
    given = arguments(1, (31, 23), 64, 64, torch.bfloat16, 0, "trained", "norm", False)
    _, _, whole = conv_grads(*given)
    with joining():
        _, _, dw = conv_grads(*given)
        left, out = waiting()
        assert out is dw and len(left) == 3
        torch.testing.assert_close(left.sum(0), whole)
