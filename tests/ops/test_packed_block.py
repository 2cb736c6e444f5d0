"""Folded blocks in one call: the same bits as their convolutions one by one, over parts of the batch, in each form."""

import copy
import pickle

import pytest
import torch
from support_conv import taken_tiles

from fastres import ops
from fastres.export.portable import portable
from fastres.models import create_model
from fastres.nn.fold import FoldedBlock, FoldedConv, FoldedPool, fold, repack
from fastres.ops import cpu
from fastres.ops.cpu import packed_block, tiles

BF16 = torch.bfloat16
pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def compiled():
    with ops.implementation("cpp"):
        yield


@pytest.fixture(params=list(tiles.FORMS))
def form(request):
    with taken_tiles(request.param):
        yield


def blocks_of(name, batch, **options):
    """The first folded blocks of the second stage, the one with a projection and the next, and an input."""
    torch.manual_seed(0)
    model = fold(create_model(name, **options).eval()).to(BF16)
    found = [module for module in model.layer2 if isinstance(module, FoldedBlock)][:2]
    inputs = found[0].convs[0].weight.shape[1]
    return found, torch.randn(batch, inputs, 8, 6).to(BF16).contiguous(memory_format=torch.channels_last)


def apart(block, x):
    """The block by its convolutions."""
    y = x
    for conv in block.convs[:-1]:
        y = conv(y)
    return block.convs[-1](y, x if block.downsample is None else block.downsample(x))


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_same_bits_over_parts_of_the_batch(name, threads, monkeypatch):
    blocks, x = blocks_of(name, 7)
    monkeypatch.setattr(packed_block, "PART_BYTES", 3 * x[0].nbytes)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for block in blocks:
            expected, given = apart(block, x), x.clone()
            assert not block.packed.is_ready
            for _ in range(2):
                assert torch.equal(block(x), expected) and torch.equal(x, given)
            assert block.packed.is_ready and len(block.packed._ready.parts) > 1
            x = expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("form")
def test_changed_weights_are_noticed():
    (block, _), x = blocks_of("resnet18", 2)
    block(x), block(x)
    with torch.no_grad():
        block.convs[0].weight.mul_(2)
    assert torch.equal(block(x), apart(block, x)) and torch.equal(block(x), apart(block, x))
    block.convs[1].weight.data.mul_(2)
    repack(block)
    assert torch.equal(block(x), apart(block, x)) and torch.equal(block(x), apart(block, x))
    block.convs[1].bias = block.convs[1].bias + 1
    assert torch.equal(block(x), apart(block, x))


def test_a_hook_on_a_convolution_is_called():
    (block, _), x = blocks_of("resnet18", 2)
    block(x), block(x)
    seen = []
    block.convs[1].register_forward_hook(lambda *_: seen.append(1))
    block(x)
    assert seen == [1]


def test_nan_passes_and_gradients_flow():
    (block, _), x = blocks_of("resnet50", 2)
    block(x)
    x[1, 0, 2, 2] = torch.nan
    y = block(x)
    assert y[1].isnan().any() and y[0].isfinite().all()
    x = torch.ones_like(x, requires_grad=True)
    block(x).float().sum().backward()
    assert x.grad is not None


def test_too_much_memory_leaves_the_convolutions(monkeypatch):
    (block, _), x = blocks_of("resnet50", 2)
    monkeypatch.setattr("fastres.ops.cpu.program.MOST_BYTES", 64)
    expected = block(x)
    assert torch.equal(block(x), expected) and not block.packed.is_ready


def test_a_copy_starts_empty():
    (block, _), x = blocks_of("resnet18", 2)
    expected = block(x)
    block(x)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert not other.packed.is_ready and torch.equal(other(x), expected) and torch.equal(other(x), expected)


def test_another_batch_and_layout():
    (block, _), x = blocks_of("resnet18", 4)
    block(x), block(x)
    for other in (x[:3], x.contiguous(), x[:, :, :, ::2]):
        assert torch.equal(block(other), apart(block, other)) and torch.equal(block(other), apart(block, other))
    assert all(type(conv) is FoldedConv for conv in block.convs)


@pytest.mark.parametrize("name", ["resnet18", "notebook"])
def test_the_pool_behind_the_stem(name):
    """It is PyTorch's where something waits for its call or wants gradients, and in a portable copy."""
    model = create_model(name).eval()
    pool, eager = fold(model).maxpool, model.maxpool
    assert isinstance(pool, FoldedPool)
    x = torch.randn(2, 40, 11, 8).relu().to(BF16).contiguous(memory_format=torch.channels_last)
    calls = []
    pool.pool.forward = lambda x: calls.append(1) or eager(x)
    assert torch.equal(pool(x), eager(x)) and not calls
    given = x.clone().requires_grad_()
    pool(given).float().sum().backward()
    assert given.grad is not None and len(calls) == 1
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(portable(model)(images), fold(model)(images), rtol=1e-4, atol=1e-4)
