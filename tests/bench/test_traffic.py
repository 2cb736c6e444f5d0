"""Bytes of a training step: the counters against kernels and blocks whose bytes are known, and the targets."""

import pytest
import torch
import triton
import triton.language as tl
from torch import nn

from bench import count_eager, count_inductor, count_triton, roofline, traffic
from bench.blocks import Part, fused, parts_of, train
from bench.roofline import Machine
from bench.traffic import each_further, measure_stage
from fastres import kernels
from fastres.kernels import batch_norm
from fastres.kernels.parts import joining, total
from fastres.nn import blocks
from fastres.reference.resnet import Bottleneck

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="counted in the interpreter only")
BF16 = torch.bfloat16


def identity_bottlenecks(count: int, width: int, size: int) -> Part:
    modules = nn.Sequential(*(Bottleneck(4 * width, width) for _ in range(count)))
    return Part("identity.0", modules.to(memory_format=torch.channels_last), (4 * width, size, size))


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, TIMES: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for _ in range(TIMES):
        tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n), mask=i < n)


@triton.jit
def add_kernel(y_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.atomic_add(y_ptr + i % 10, 1.0, mask=i < n)


@pytest.mark.parametrize("dtype, times", [(torch.float32, 1), (torch.bfloat16, 3)])
def test_masked_and_repeated_loads_of_a_copy(dtype, times):
    def step(n):
        x = torch.zeros(n, dtype=dtype)
        copy_kernel[(triton.cdiv(n, 64),)](x, torch.empty_like(x), n, TIMES=times, BLOCK=64)

    (launch,) = count_triton._launches(step, 1000, everything=True)
    size = 1000 * dtype.itemsize
    assert (launch.kernel, launch.loaded, launch.stored) == ("copy_kernel", size, size)
    assert launch.issued == 2 * size * times and launch.least == 2 * size


def test_an_atomic_loads_and_stores():
    (launch,) = count_triton._launches(lambda n: add_kernel[(1,)](torch.zeros(32), n, BLOCK=64), 50, everything=True)
    assert (launch.loaded, launch.stored, launch.issued, launch.least) == (40, 40, 400, 128)


def test_what_is_extrapolated_is_what_a_larger_batch_does():
    part = identity_bottlenecks(2, 16, 7)
    module = fused(part)

    def step(n):
        train(module, part.images(n, BF16), BF16)

    found = count_triton.traffic(step, 5)
    whole = count_triton._launches(step, 5, everything=True)
    assert [(launch.kernel, launch.loaded, launch.stored) for launch in found] == [
        (launch.kernel, launch.loaded, launch.stored) for launch in whole
    ]
    assert sum(launch.issued for launch in found) == pytest.approx(sum(launch.issued for launch in whole), rel=0.05)


def test_no_convolution_of_a_large_batch_is_interpreted(monkeypatch):
    """Each kind of kernel takes the tiles of the large batch at one image too, so that it stands for it."""
    part = identity_bottlenecks(1, 64, 8)
    module, asked, launches = fused(part), [], count_triton._launches

    def noted(step, batch, kernels=(), everything=False):
        asked.append((batch, kernels, everything))
        return launches(step, batch, kernels, everything)

    monkeypatch.setattr(count_triton, "_launches", noted)
    found = count_triton.traffic(lambda n: train(module, part.images(n, BF16), BF16), 300)
    assert [(batch, everything) for batch, _, everything in asked] == [(300, False), (1, True), (300, False)]
    assert {"conv_resident_kernel", "conv_grads_kernel"} <= {launch.kernel for launch in found}
    assert not [kernel for kernel in asked[-1][1] if kernel.startswith("conv")]


def test_eager_moves_what_its_passes_add_up_to():
    """In units of M*w: 54 forward, 84 backward."""
    part = identity_bottlenecks(1, 16, 56)
    calls = count_eager.traffic(part.modules, part.images(8, BF16), BF16)
    unit = 8 * 56 * 56 * 16 * 2
    assert sum(call.loaded + call.stored for call in calls) / unit == pytest.approx(54 + 84, rel=0.01)
    halves = [call.kernel for call in calls if call.kernel.startswith("convolution_backward")]
    assert halves == ["convolution_backward dgrad", "convolution_backward wgrad"] * 3


def test_inductor_schedules_for_a_gpu():
    """At best the 34 + 70 units of everything elementwise fused; what it really fuses, and less than eager."""
    part = identity_bottlenecks(1, 16, 56)
    calls = count_inductor.traffic(part.modules, part.images(8, BF16), BF16)
    unit = 8 * 56 * 56 * 16 * 2
    assert 34 + 66 < sum(call.loaded + call.stored for call in calls) / unit < 54 + 84 - 15
    names = [call.kernel for call in calls]
    assert sum(name.endswith(".convolution") for name in names) == 3
    assert sum("convolution_backward" in name for name in names) == 3


@pytest.fixture(scope="module")
def stage():
    return measure_stage(identity_bottlenecks(2, 32, 14), 256)


@pytest.mark.parametrize("other, share", [("eager", 0.60), ("compiled", 0.80)])
def test_target_of_bytes_moved_by_an_identity_bottleneck(stage, other, share):
    moved = each_further(stage.first.moved, stage.moved, 1)
    assert moved["fused"] / moved[other] <= share


@pytest.mark.parametrize("mode, share", [("fused", 0.85), ("recompute", 0.60)])
def test_target_of_memory_kept_by_an_identity_bottleneck(stage, mode, share):
    saved = each_further(stage.first.saved, stage.saved, 1)
    assert saved[mode] / saved["eager"] <= share


def test_target_of_bytes_moved_by_a_block_that_subsamples_its_shortcut():
    """Neither its forward nor its backward leaves a pass to ATen; its window reads the activation that a pass made."""
    part = next(part for part in parts_of("resnet20", 32) if part.name == "layer3.0")
    one = traffic.measure(part.first(), 256)
    assert one.moved["fused"] <= min(0.60 * one.moved["eager"], 0.83 * one.moved["compiled"])
    assert sum(call.loaded + call.stored for call in one.other) <= 0.02 * one.moved["fused"]


def test_launches_move_little_more_than_each_tensor_once(stage):
    """Less for rows of coefficients that are not read."""
    assert len(stage.counted.launches) > 20
    for launch in stage.counted.launches:
        assert launch.loaded + launch.stored <= launch.least <= launch.issued * 1.5


def test_a_network_is_taken_apart_whole():
    parts = parts_of("resnet50", 224, num_classes=1000)
    assert [(part.name, part.blocks) for part in parts] == [
        ("stem", 1), ("layer1.0", 3), ("layer2.0", 4), ("layer3.0", 6), ("layer4.0", 3),
    ]  # fmt: skip
    assert parts[-1].shape == (1024, 14, 14)


def test_a_long_stage_is_counted_by_its_first_blocks(monkeypatch):
    """Exact where chains are full but for what Inductor does at the ends; the roofline makes the same of the record."""
    monkeypatch.setattr(traffic, "MOST", 2)
    monkeypatch.setattr(traffic, "LONGEST", 2)
    monkeypatch.setattr(blocks, "LONGEST", 2)
    part = identity_bottlenecks(5, 16, 7)
    stage = traffic.measure_stage(part, 4)
    whole = traffic.measure(part, 4)
    assert (stage.blocks, len(stage.counted.part.modules)) == (5, 3)
    near = {"eager": 1e-9, "compiled": 0.01, "fused": 1e-9}
    for kind, tolerance in near.items():
        assert stage.moved[kind] == pytest.approx(whole.moved[kind], rel=tolerance)
    assert stage.saved == pytest.approx(whole.saved)

    monkeypatch.setattr(roofline, "parts_of", lambda *_: [part])
    whole_record = {**traffic.as_record(whole), "counted": 5}
    made = []
    for record in (traffic.stage_record(stage), [whole_record, whole_record]):
        network = {"model": "", "image": 7, "options": {}, "batch": 4, "stages": [record]}
        steps = roofline.steps_of(network)
        made.append({kind: roofline.predict(step, Machine(1e12, 1e14, 1e-6)) for kind, step in steps.items()})
    for kind, figures in made[0].items():
        assert figures == pytest.approx(made[1][kind], rel=near[kind])


@pytest.mark.parametrize("parts", [19, 300])
def test_a_sum_of_parts_is_counted_in_wide_tiles_as_in_its_own(monkeypatch, parts):
    """Alone and in the launch of BatchNorm's coefficients."""

    def step(n):
        with joining():
            total(torch.zeros(parts, 700, 1, 1, 3))
            batch_norm.bn_backward_coef(torch.zeros(40, 2, 12), torch.zeros(5, 12), 99, True)
        total(torch.zeros(parts, 700, 1, 1, 3))

    def counts():
        count_triton._interpreted.clear()
        found = count_triton._launches(step, 1, everything=True)
        return [(one.kernel, one.loaded, one.stored, one.issued, one.programs) for one in found]

    wide = counts()
    monkeypatch.setattr(count_triton, "_in_wide_tiles", lambda grid, bound, kwargs: (grid, kwargs))
    assert wide == counts() and [kernel for kernel, *_ in wide] == ["bn_backward_coef_kernel", "sum_parts_kernel"]
    assert all(loaded >= parts * 2100 * 4 for _, loaded, *_ in wide)


def test_programs_that_keep_weights_are_counted_in_long_steps_as_in_their_own(monkeypatch):
    """Each of the kernels that have them; the parts that they write are as many."""
    half = torch.bfloat16

    def step(n):
        x, dz = torch.zeros(n, 21, 20, 64, dtype=half), torch.zeros(n, 21, 20, 32, dtype=half)
        w, abc, coef = torch.zeros(32, 1, 1, 64, dtype=half), torch.zeros(3, 32), torch.zeros(5, 64)
        kernels.conv(x, torch.zeros(64, 1, 1, 64, dtype=half), 1, (0, 0, 0, 0), coef)
        kernels.conv_grads(dz, dz.clone(), abc, w, x, coef)
        image, stem = torch.zeros(n, 41, 40, 3, dtype=half), torch.zeros(32, 5, 5, 3, dtype=half)
        kernels.conv(image, stem, 2, (2, 2, 2, 2))
        kernels.conv_wgrad(dz, None, None, image, None, 2, (2, 2, 2, 2), (5, 5))

    def counts():
        count_triton._interpreted.clear()
        found = count_triton._launches(step, 3, everything=True)
        return [(one.kernel, one.loaded, one.stored, one.programs) for one in found]

    long = counts()
    monkeypatch.setattr(count_triton, "_in_long_steps", lambda kwargs: kwargs)
    monkeypatch.setattr(count_triton, "WIDE", 256)
    assert long == counts()
    kept = {"conv_resident_kernel", "conv_grads_kernel", "conv_stem_kernel", "conv_stem_wgrad_kernel"}
    assert {kernel for kernel, *_ in long} >= kept
