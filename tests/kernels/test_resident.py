"""Pointwise convolution whose weights stay, against fp64 and against the kernel of a program a tile."""

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support_conv import exact, statistics
from support_flat import aten
from support_kernels import (
    HALVES,
    assert_as_good,
    assert_same_bits,
    few_examples,
    guarded,
    on_gpus_of,
    randn,
    random_coef,
    seeds,
)

from fastres.kernels.configs import LANES, PROGRAMS, REGISTERS, Product, programs_at_once, resident_configs, steps_of
from fastres.kernels.conv import conv

PAD = (0, 0, 0, 0)
pytestmark = on_gpus_of(8, 9, 12)


def product(cin, cout, rows=10**6, **changes):
    return Product(**{**dict(rows=rows, columns=cout, depth=cin, dtype=torch.bfloat16), **changes})


@few_examples
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 11), st.integers(1, 11)).filter(lambda s: s[0] * s[1] * s[2] <= 150),
    st.sampled_from([16, 20, 64, 72, 136]),
    st.sampled_from([40, 64, 72, 136]),
    st.sampled_from(HALVES),
    seeds(),
    st.booleans(),
)
def test_conv(size, cin, cout, dtype, seed, prologue):
    x, w = randn(*size, cin, seed=seed, dtype=dtype), randn(cout, 1, 1, cin, seed=seed + 1) * (2 / cin) ** 0.5
    args = x, w.to(dtype), 1, PAD, random_coef(cin, seed + 2) if prologue else None
    assert resident_configs(product(cin, cout))
    y, moments = guarded(conv, *args)
    assert_as_good(y, aten.conv(*args)[0], aten.conv(*exact(args))[0], terms=cin)
    assert moments.count.sum() == y.numel() // cout
    stored = y.double().flatten(0, 2)
    pair = torch.stack([stored.mean(0), stored.var(0, correction=0)])
    assert_as_good(statistics(moments), aten.finalize(aten.moments(y), None, None, 0.0)[:2], pair)
    other, _ = conv(*args, rank=1)  # of a tile a program
    torch.testing.assert_close(y, other)
    assert_same_bits(conv(*args, moments=False)[0], y)


@pytest.mark.parametrize("least, most, parts", [(1, 1, 23), (1, 512, 23), (4, 512, 6), (8, 8, 3), (64, 512, 1)])
def test_parts_of_the_pixels(least, most, parts):
    """Whatever their number, with a last one that is shorter than the others."""
    args = randn(1, 31, 23, 72, seed=0, dtype=HALVES[1]), randn(72, 1, 1, 72, seed=1, dtype=HALVES[1]), 1, PAD
    held = dict(LEAST_STEPS_HELD=least, MOST_STEPS_HELD=most)
    with mock.patch.multiple("fastres.kernels.configs", **held):
        y, moments = guarded(conv, *args)
        assert_same_bits((y, tuple(moments)), conv(*args))
    assert len(moments.count) == parts and moments.count.sum() == 31 * 23
    stored = y.double().flatten(0, 2)
    found = statistics(moments).double()
    torch.testing.assert_close(found[0], stored.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], stored.var(0, correction=0), rtol=1e-5, atol=0)


def test_a_part_without_spread_has_none():
    """Of a large mean, over many steps: what Welford's recurrence rounds away of 1024 would be seen."""
    x = torch.ones(1, 40, 40, 64, dtype=HALVES[0], device=randn(1, seed=0).device)
    w = torch.full_like(x[:, :8, :8], 16.0).reshape(64, 1, 1, 64)
    with mock.patch("fastres.kernels.configs.PROGRAMS", 1):
        y, (count, mean, m2) = conv(x, w, 1, PAD)
    assert (y == 1024).all() and (mean == 1024).all() and (m2 == 0).all() and len(count) == 3


@pytest.mark.parametrize(
    "changes",
    [dict(taps=9), dict(loaded=2), dict(flat=True), dict(arch=75), dict(arch=80), dict(arch=100),
     dict(dtype=torch.float32), dict(least_registers=168), dict(depth=8), dict(depth=264), dict(columns=32)],
)  # fmt: skip
def test_what_it_does_not_do(changes):
    """Windows, the end of a block, GELU, fp32, other tensor cores, channels that are too few or too many."""
    assert resident_configs(product(64, 64)) and not resident_configs(product(64, 64, **changes))


def test_a_residual_takes_the_other_kernel():
    x, residual = (randn(1, 5, 5, 64, seed=seed, dtype=HALVES[1]) for seed in (0, 1))
    w = randn(64, 1, 1, 64, seed=2, dtype=HALVES[1])
    with mock.patch("fastres.kernels.conv.conv_resident", side_effect=AssertionError):
        y, _ = conv(x, w, 1, PAD, residual=residual)
        conv(x, w, 2, PAD)
    exactly, _ = aten.conv(*exact((x, w, 1, PAD, None, residual)))
    torch.testing.assert_close(y.double(), exactly, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("cin", [16, 64, 128, 200, 256])
@pytest.mark.parametrize("cout", [40, 64, 512])
def test_a_program_holds_what_stays(cin, cout):
    """The result and its statistics within the registers that a thread may have; programs fill a GPU once."""
    configs = resident_configs(product(cin, cout))
    assert configs
    for one in configs:
        at_once = programs_at_once(one)
        assert one.block_k >= cin and at_once * one.most_registers * LANES * one.num_warps <= REGISTERS
        assert 3 * one.block_m * one.block_n <= 0.6 * one.most_registers * LANES * one.num_warps
        groups = -(-cout // one.block_n)
        steps = steps_of(10**6, groups, one, at_once)
        programs = groups * -(-(10**6) // (one.block_m * steps))
        assert steps == 512 or 0.9 * at_once * PROGRAMS <= programs <= at_once * PROGRAMS
