"""Bytes of a training step: the counters against kernels and blocks whose bytes are known, and the targets."""

import pytest
import torch
import triton
import triton.language as tl

from bench import count_eager, count_inductor, count_triton
from bench.blocks import Block, blocks_of, fused, train
from bench.traffic import measure
from fastres.reference.resnet import Bottleneck

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="counted in the interpreter only")
BF16 = torch.bfloat16


def identity_bottleneck(width: int, size: int) -> Block:
    module = Bottleneck(4 * width, width).to(memory_format=torch.channels_last)
    return Block("identity", 1, module, (4 * width, size, size))


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
    block = identity_bottleneck(16, 7)
    module = fused(block)

    def step(n):
        train(module, block.images(n, BF16), BF16)

    found = count_triton.traffic(step, 5)
    whole = count_triton._launches(step, 5, everything=True)
    assert [(launch.kernel, launch.loaded, launch.stored) for launch in found] == [
        (launch.kernel, launch.loaded, launch.stored) for launch in whole
    ]
    assert sum(launch.issued for launch in found) == pytest.approx(sum(launch.issued for launch in whole), rel=0.05)


def test_eager_moves_what_its_passes_add_up_to():
    """In units of M*w: 54 forward, 84 backward."""
    block = identity_bottleneck(16, 56)
    calls = count_eager.traffic(block.module, block.images(8, BF16), BF16)
    unit = 8 * 56 * 56 * 16 * 2
    assert sum(call.loaded + call.stored for call in calls) / unit == pytest.approx(54 + 84, rel=0.01)
    halves = [call.kernel for call in calls if call.kernel.startswith("convolution_backward")]
    assert halves == ["convolution_backward dgrad", "convolution_backward wgrad"] * 3


def test_inductor_schedules_for_a_gpu():
    """At best the 34 + 70 units of everything elementwise fused; what it really fuses, and less than eager."""
    block = identity_bottleneck(16, 56)
    calls = count_inductor.traffic(block.module, block.images(8, BF16), BF16)
    unit = 8 * 56 * 56 * 16 * 2
    assert 34 + 66 < sum(call.loaded + call.stored for call in calls) / unit < 54 + 84 - 15
    names = [call.kernel for call in calls]
    assert sum(name.endswith(".convolution") for name in names) == 3
    assert sum("convolution_backward" in name for name in names) == 3


def test_targets_of_an_identity_bottleneck():
    found = measure(identity_bottleneck(32, 14), 256)
    moved, saved = found.moved, found.saved
    assert moved["fused"] / moved["eager"] <= 0.60
    assert moved["fused"] / moved["inductor"] <= 0.80
    assert saved["fused"] / saved["eager"] <= 0.85
    assert saved["fewer"] / saved["eager"] <= 0.60


def test_a_network_is_taken_apart_whole():
    blocks = blocks_of("resnet50", 224, num_classes=1000)
    assert [(block.name, block.count) for block in blocks] == [
        ("stem", 1), ("layer1.0", 1), ("layer1.1", 2), ("layer2.0", 1), ("layer2.1", 3), ("layer3.0", 1),
        ("layer3.1", 5), ("layer4.0", 1), ("layer4.1", 2),
    ]  # fmt: skip
    assert blocks[-1].shape == (2048, 7, 7)
