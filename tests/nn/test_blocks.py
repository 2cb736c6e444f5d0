"""Fused blocks as modules: constructors, layouts, errors, checkpointing and the memory they keep."""

import copy

import pytest
import torch
from support_nets import assert_same, perturbed, train_step
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastres.nn import BasicBlock, Bottleneck, ConvBNReLU, PreActBottleneck, Stem, fuse, unfuse
from fastres.reference.resnet import Bottleneck as EagerBottleneck
from fastres.reference.resnet import conv1x1


def projection(inputs, outputs, stride):
    return nn.Sequential(conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))


BLOCKS = {
    "basic": lambda: BasicBlock(8, 8),
    "basic-stride": lambda: BasicBlock(8, 12, 2, projection(8, 12, 2)),
    "basic-plain": lambda: BasicBlock(8, 8, residual=False),
    "bottleneck": lambda: Bottleneck(8, 2),
    "bottleneck-stride": lambda: Bottleneck(8, 4, 2, projection(8, 16, 2)),
    "preact": lambda: PreActBottleneck(8, 2),
    "preact-stride": lambda: PreActBottleneck(8, 4, 2, conv1x1(8, 16, 2)),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_equals_its_eager_original(name):
    fused = perturbed(BLOCKS[name]()).double()
    eager = unfuse(copy.deepcopy(fused))
    assert type(eager).__module__.startswith("fastres.reference")
    x = torch.randn(2, 8, 7, 6, dtype=torch.float64)
    assert_same(train_step(fused, x), train_step(eager, x), 1e-10)


@pytest.mark.parametrize("pool", [True, False])
def test_stem_equals_its_parts(pool):
    stem = perturbed(Stem(pool=pool)).double()
    parts = nn.Sequential(stem.conv1, stem.bn1, nn.ReLU(), stem.maxpool if pool else nn.Identity())
    parts = copy.deepcopy(parts)
    x = torch.randn(2, 3, 21, 22, dtype=torch.float64)
    ours, theirs = train_step(stem, x), train_step(parts, x)
    names = {"conv1": "0", "bn1": "1"}
    for old, new in names.items():
        ours = {name.replace(f"{old}.", f"{new}."): value for name, value in ours.items()}
    assert_same(ours, theirs, 1e-10)


def test_either_memory_format_gives_the_same_bits():
    block = BasicBlock(8, 8)
    x = torch.randn(2, 8, 6, 5)
    outs = [copy.deepcopy(block)(x.contiguous(memory_format=f)) for f in (torch.channels_last, torch.contiguous_format)]
    assert torch.equal(*outs)
    assert all(out.is_contiguous(memory_format=torch.channels_last) for out in outs)


def test_a_gradient_of_any_layout_is_taken():
    block = Bottleneck(8, 2).double()
    x = torch.randn(2, 8, 6, 5, dtype=torch.float64, requires_grad=True)
    out = block(x)
    weights = torch.randn_like(out, memory_format=torch.contiguous_format)
    (expected,) = torch.autograd.grad((out * weights).sum(), x, retain_graph=True)
    (transposed,) = torch.autograd.grad((out.transpose(2, 3) * weights.transpose(2, 3)).sum(), x)
    torch.testing.assert_close(transposed, expected)


@pytest.mark.parametrize("module", [ConvBNReLU(4, 6, 3), Stem(4, 6), PreActBottleneck(4, 1), BasicBlock(4, 4)])
def test_five_dimensions(module):
    with pytest.raises(RuntimeError, match=r"expected 4D input \(got 5D input\)"):
        module(torch.randn(1, 4, 8, 8, 8))


def test_wrong_channels_in_pytorchs_words():
    with pytest.raises(RuntimeError, match=r"weight of size \[2, 8, 1, 1\], expected input\[1, 4, 8, 8\] to have 8 ch"):
        Bottleneck(8, 2)(torch.randn(1, 4, 8, 8))


def test_one_value_per_channel_in_training_only():
    block = BasicBlock(4, 4)
    x = torch.randn(1, 4, 1, 1)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        block(x)
    assert block.eval()(x).shape == x.shape


def test_autocast_keeps_fp32_parameters_and_gradients():
    block = fuse(EagerBottleneck(8, 2))
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x)
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert {p.grad.dtype for p in block.parameters()} == {torch.float32} and x.grad.dtype == torch.float32
    assert block.bn1.running_mean.dtype == torch.float32


def test_plain_checkpointing_counts_statistics_twice_as_batch_norm_does():
    fused = perturbed(nn.Sequential(Bottleneck(8, 2), Bottleneck(8, 2))).double()
    eager = unfuse(copy.deepcopy(fused))
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    ours, theirs = (
        train_step(blocks, x, lambda x, blocks=blocks: checkpoint(blocks, x, use_reentrant=False))
        for blocks in (fused, eager)
    )
    assert fused[0].bn1.num_batches_tracked == eager[0].bn1.num_batches_tracked == 2
    assert fused[1].bn1.num_batches_tracked == 1  # its one operation ends the recomputation before the update
    comparable = [name for name in ours if not name.startswith("1.")]
    assert_same({name: ours[name] for name in comparable}, {name: theirs[name] for name in comparable}, 1e-10)


def saved_bytes(blocks: nn.Module, x: torch.Tensor) -> int:
    """Bytes of the distinct storages of activations that a forward keeps, parameters and vectors left out."""
    held = {}

    def pack(tensor):
        if tensor.dim() == 4 and not isinstance(tensor, nn.Parameter) and tensor.shape[0] == x.shape[0]:
            held[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = blocks(x)
    assert out.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


@pytest.mark.parametrize("recompute, share", [(False, 0.85), (True, 0.60)])
def test_memory_kept_for_backward(recompute, share):
    """Of identity bottlenecks in a row: 10 and 6 units of M*w a block, where eager PyTorch keeps 12."""
    x = torch.randn(5, 64, 14, 14).contiguous(memory_format=torch.channels_last)
    eager = nn.Sequential(*(EagerBottleneck(64, 16) for _ in range(4)))
    before = saved_bytes(eager, x)
    after = saved_bytes(fuse(eager, recompute=recompute), x)
    unit = x.numel() // 4 * 4  # M*w in fp32
    assert before == (4 + 4 * 12) * unit
    assert after == (4 + 4 * {False: 10, True: 6}[recompute]) * unit
    assert after / before <= share


def test_nothing_is_kept_without_gradients():
    block = Bottleneck(8, 2)
    with torch.no_grad():
        assert not block(torch.randn(2, 8, 6, 6)).requires_grad
