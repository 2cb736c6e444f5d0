"""Tiles by architecture: what tensor cores of registers need, and what those of the shared memory gain."""

import pytest
import torch

from fastres.kernels import configs as tables
from fastres.kernels.configs import (
    LIGHT,
    MORE_REGISTERS,
    OTHER,
    PROGRAMS,
    ROOMY,
    SHALLOW,
    SQUARE,
    Config,
    Product,
    conv_configs,
    dgrad_configs,
    light_parts,
    splits,
    weight_programs,
    wgrad_configs,
)

OTHERS = (OTHER, 75, 80, 86, 89, 100, 120)


def product(**changes):
    return Product(**{**dict(rows=10**6, columns=256, depth=256, dtype=torch.bfloat16, taps=9, made=True), **changes})


@pytest.mark.parametrize("configs", [conv_configs, dgrad_configs])
@pytest.mark.parametrize("arch", [*OTHERS, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [3, 16, 40, 64, 72, 128, 2048])
def test_tiles_fit_the_channels_and_are_different(configs, arch, dtype, columns):
    for taps in (1, 9):
        for loaded in (1, 2):
            found = configs(product(arch=arch, dtype=dtype, columns=columns, depth=24, taps=taps, loaded=loaded))
            assert 1 <= len(set(found)) == len(found)
            assert all(one.block_n < 2 * max(columns, 16) and one.block_k <= 32 for one in found)
            # A thread has its part of the registers, and half of them or more beside its part of the accumulator.
            threads = 64 if arch == OTHER else 32
            assert all(one.most_registers * one.num_warps * 32 <= 65536 for one in found)
            accumulators = [one.block_m * one.block_n / (one.num_warps * threads) for one in found]
            assert all(count <= (one.most_registers + 1) / 2 for count, one in zip(accumulators, found))


@pytest.mark.parametrize("arch", OTHERS)
def test_only_warp_groups_take_their_tiles(arch):
    hopper, other = conv_configs(product(arch=90)), conv_configs(product(arch=arch))
    assert hopper[0].block_m * hopper[0].block_n > 128 * 128
    assert all(one.num_warps <= 8 and one.block_m * one.block_n <= 128 * 128 for one in other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_without_tensor_cores_only_small_tiles_do_not_spill(dtype):
    """On Turing, where Triton has none; they are compiled in `tests/bench/test_aot.py`."""
    (conv,) = conv_configs(product(arch=75, dtype=dtype))
    (dgrad,) = dgrad_configs(product(arch=75, dtype=dtype, loaded=2))
    (wgrad,) = wgrad_configs(256, 256, 10**6, dtype, arch=75)
    assert {one[:3] for one in (conv, dgrad, wgrad)} == {(64, 64, 16)}


def test_amds_launches_have_no_limit_of_registers(monkeypatch):
    (config, *_) = conv_configs(product(arch=OTHER))
    assert config.launch["maxnreg"] == config.most_registers
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "maxnreg" not in config.launch and tables.limited(128) == {}


@pytest.mark.parametrize("configs", [conv_configs, dgrad_configs])
@pytest.mark.parametrize("depth, columns", [(24, 96), (24, 128), (96, 96), (96, 192)])
def test_windows_whose_steps_would_be_half_empty_take_shallow_ones(configs, depth, columns):
    """Unless a GPU has less than two rounds of such tiles; a tile of 64 channels reads too much to be worth it."""
    many, few, narrow = (
        configs(product(depth=depth, columns=columns, rows=rows, made=False))[0]
        for rows, columns in ((10**6, columns), (130 * 256, columns), (10**6, 64))
    )
    assert many == SHALLOW and few != SHALLOW and narrow != SHALLOW
    assert configs(product(depth=depth, columns=columns, arch=80, made=False))[0].block_m == 128


def test_channels_that_are_no_power_of_2_take_square_tiles_that_do_not_spill():
    """Of a pointwise convolution and with two tensors to load they would."""
    window = product(depth=192, columns=192, made=False)
    assert conv_configs(window)[0] == Config(128, 128, 64, 8, 3, 128)
    assert conv_configs(window._replace(columns=384))[0].most_registers == 255
    assert all(one.block_n <= 64 for one in conv_configs(window._replace(taps=1)))


def test_a_small_batch_takes_smaller_tiles():
    assert conv_configs(product(rows=150 * 128))[0][:2] == (128, 128)  # and leaves no multiprocessor idle
    assert conv_configs(product(rows=10 * PROGRAMS))[0] == conv_configs(product())[-1]
    assert sorted(conv_configs(product(rows=10))) == sorted(conv_configs(product()))


@pytest.mark.parametrize("columns", [64, 96, 128, 256])
def test_gradients_that_store_what_they_compute_have_the_registers_that_triton_3_6_needs(columns):
    """What `bench.aot` found to spill with it: windows on sm_90, in large tiles and in small ones of 128 registers."""
    window = dgrad_configs(product(columns=columns, loaded=2, stores=True))
    assert all(one.block_m * one.block_n <= 128 * 64 for one in window)
    assert all(one.most_registers >= MORE_REGISTERS for one in window if one.num_warps == 4)
    assert window[0][:2] == (128, 64) and window[0].most_registers == 128  # two programs at once
    for changes in (dict(stores=False), dict(stores=True, taps=1)):
        kept = dgrad_configs(product(**{**dict(columns=columns, loaded=2), **changes}))
        assert kept == dgrad_configs(product(**{**dict(columns=columns, loaded=2), **changes, "stores": False}))


@pytest.mark.parametrize("arch", [80, 86, 89, 120])
def test_a_strided_residual_beside_a_stored_operand_takes_shallow_steps(arch):
    def of(**changes):
        first, *others = dgrad_configs(product(arch=arch, taps=1, loaded=2, **changes))
        assert first == ROOMY
        return others

    assert of(stores=True, strided=True)[0][:3] == (128, 128, 32) and of(stores=True, strided=True)[1:] == of()[1:]
    assert of(stores=True) == of(strided=True) == of() and of()[0][:3] == (128, 128, 64)


@pytest.mark.parametrize("arch", [80, 120, 90])
def test_a_stored_operand_of_one_tensor_takes_shallow_steps_where_no_warp_groups_are(arch):
    """With Triton 3.8 it spilled on sm_120."""
    deep, stored = (dgrad_configs(product(arch=arch, taps=1, loaded=1, stores=one)) for one in (False, True))
    if arch != 90:
        assert deep.pop(0) == stored.pop(0) == ROOMY
    assert deep[0][:3] == (128, 128, 64) and stored[0][2] == (64 if arch == 90 else 32) and stored[1:] == deep[1:]


@pytest.mark.parametrize("columns, widest", [(96, 64), (192, 128), (384, 128), (128, 128), (256, 256), (2048, 256)])
def test_wide_tiles_of_warp_groups_are_for_powers_of_two(columns, widest):
    """Others spilled: speed95's."""
    found = conv_configs(product(columns=columns, made=False))
    assert max(one.block_n for one in found) == widest


def test_windows_of_few_channels_take_narrow_tiles_on_warp_groups():
    """Of 24 channels to 96 in 128x128 they spilled; wider ones keep their tiles."""
    few = conv_configs(product(columns=64, depth=24, made=False))
    assert few[0][:2] == (128, 64) and all(one.block_n == 64 for one in few)
    for columns in (96, 128, 256):
        deep = conv_configs(product(columns=columns, depth=64, made=False))
        assert any(one.block_n >= 128 for one in deep) == (columns != 96)


def test_parts_of_a_sum_fill_the_multiprocessors():
    """As many as run at once by their registers, each of several steps at least."""
    (alone, *_) = wgrad_configs(256, 256, 10**6, torch.bfloat16, arch=100)
    (lean, *_) = wgrad_configs(128, 128, 10**6, torch.bfloat16, arch=90, made=False, window=(2, 2))
    assert (alone.most_registers, lean.most_registers) == (255, 128)
    assert [splits(4, 10**6, one, 0) for one in (alone, lean)] == [PROGRAMS // 4, 2 * PROGRAMS // 4]
    assert splits(4, 64 * 32, lean, 0) == 2 and splits(4, 64 * 16, alone, 0) == 2 and splits(10**4, 10**6, lean, 0) == 1


@pytest.mark.parametrize("arch", [80, 86, 89, 120])
def test_where_products_are_of_registers_several_programs_run_side_by_side(arch):
    """Three of few registers, two of many; of fp32, few channels and a gathered axis the tiles stay."""
    plain = dict(arch=arch, made=False)
    assert conv_configs(product(**plain))[:2] == [SQUARE, LIGHT] == dgrad_configs(product(**plain))[:2]
    assert conv_configs(product(arch=arch))[:2] == [LIGHT, SQUARE]
    assert conv_configs(product(**plain, columns=64))[0] == LIGHT == dgrad_configs(product(**plain, columns=64))[0]
    assert dgrad_configs(product(**plain, columns=64, sums=True))[0] == (LIGHT if arch == 80 else ROOMY)
    assert dgrad_configs(product(arch=arch, taps=1, loaded=2))[0] == ROOMY
    assert wgrad_configs(256, 256, 10**6, torch.bfloat16, arch=arch, made=False)[0] == LIGHT
    assert wgrad_configs(64, 256, 10**6, torch.bfloat16, arch=arch)[0][:2] == (64, 64)
    for changes in (dict(dtype=torch.float32), dict(columns=32), dict(flat=True, depth=27)):
        assert not {LIGHT, SQUARE, ROOMY} & {*conv_configs(product(**plain, **changes))}


def test_a_row_of_taps_is_summed_by_one_program_where_there_are_enough_pixels():
    """On warp groups, of 16-bit operands that are there or of gradients that are made; programs are for all taps."""
    window = dict(made=False, window=(3, 3))
    for rows, columns, programs in ((64, 64, 3), (128, 64, 6), (512, 512, 48)):
        first, *_, last = wgrad_configs(rows, columns, 10**6, torch.bfloat16, **window)
        assert (first.taps, last.taps) == (3, 1)
        assert weight_programs(first, rows, columns, (3, 3)) == programs
    assert wgrad_configs(16, 16, 10**6, torch.bfloat16, made=True, reads_made=True, window=(3, 3))[0].taps == 3
    assert [one.taps for one in wgrad_configs(256, 256, 10**6, torch.bfloat16, **window)[:3]] == [1, 3, 1]

    def rowwise(rows=128, columns=128, pixels=10**6, dtype=torch.bfloat16, **changes):
        return {one.taps for one in wgrad_configs(rows, columns, pixels, dtype, **{**window, **changes})} != {1}

    assert rowwise() and rowwise(dtype=torch.float16) and rowwise(pixels=66 * 8 * 32)
    assert not rowwise(pixels=8 * 32) and not rowwise(dtype=torch.float32) and not rowwise(arch=80)
    assert not rowwise(window=(5, 5)) and not rowwise(window=(1, 1)) and not rowwise(reads_made=True)


def test_parts_beyond_two_a_multiprocessor_weigh_little():
    (small, *_) = wgrad_configs(64, 64, 10**6, torch.bfloat16, arch=90, made=False)
    assert small.num_warps == 4 and small.most_registers == 168
    assert [splits(9, 10**6, small, light) for light in (0, 40, 1000)] == [29, 40, 44]


@pytest.mark.parametrize("pixels, cin, cout, taps", [(256 * 1024, 64, 64, 9), (10**6, 64, 256, 1), (100, 512, 512, 9)])
def test_light_parts_move_an_eighth_of_what_the_product_reads(pixels, cin, cout, taps):
    """Each is stored and loaded in fp32; one more would move more."""
    read, weights = 2 * pixels * (cin + cout), taps * cin * cout
    parts = light_parts(read, weights)
    assert 2 * 4 * weights * parts <= read / 8 < 2 * 4 * weights * (parts + 1)
