"""Tiles by architecture: what tensor cores of registers need, and what those of the shared memory gain."""

import pytest
import torch

from fastres.kernels.configs import PROGRAMS, Product, conv_configs, dgrad_configs, splits, wgrad_configs

OLDER = (75, 80, 86, 89, 100, 120)


def product(**changes):
    return Product(**{**dict(rows=10**6, columns=256, depth=256, dtype=torch.bfloat16, taps=9, made=True), **changes})


@pytest.mark.parametrize("configs", [conv_configs, dgrad_configs])
@pytest.mark.parametrize("arch", [*OLDER, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [3, 16, 40, 64, 72, 128, 2048])
def test_tiles_fit_the_channels_and_are_different(configs, arch, dtype, columns):
    for taps in (1, 9):
        for loaded in (1, 2):
            found = configs(product(arch=arch, dtype=dtype, columns=columns, depth=24, taps=taps, loaded=loaded))
            assert 1 <= len(set(found)) == len(found)
            assert all(one.block_n < 2 * max(columns, 16) and one.block_k <= 32 for one in found)
            # A thread has its part of the registers, and a part of the accumulator that leaves it some.
            assert all(one.most_registers * one.num_warps * 32 <= 65536 for one in found)
            assert all(one.block_m * one.block_n <= 64 * one.num_warps * 32 for one in found)


@pytest.mark.parametrize("arch", OLDER)
def test_only_warp_groups_take_their_tiles(arch):
    hopper, other = conv_configs(product(arch=90)), conv_configs(product(arch=arch))
    assert hopper[0].num_warps == 16 and all(one.num_warps <= 8 for one in other)


def test_a_small_batch_takes_smaller_tiles():
    assert conv_configs(product(rows=128 * PROGRAMS))[0][:2] == (128, 128)
    assert conv_configs(product(rows=10 * PROGRAMS))[0] == conv_configs(product())[-1]
    assert sorted(conv_configs(product(rows=10))) == sorted(conv_configs(product()))


def test_parts_of_a_sum_fill_the_multiprocessors():
    """As many as run at once by their registers, each of several steps at least."""
    (alone, *_) = wgrad_configs(256, 256, 10**6, torch.bfloat16, arch=80)
    (lean, *_) = wgrad_configs(256, 256, 10**6, torch.bfloat16, arch=90, made=False)
    assert (alone.most_registers, lean.most_registers) == (255, 128)
    assert (splits(4, 10**6, alone), splits(4, 10**6, lean)) == (PROGRAMS // 4, 2 * PROGRAMS // 4)
    assert splits(4, 64 * 16, lean) == 2 and splits(10**4, 10**6, lean) == 1
