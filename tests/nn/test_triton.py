"""Blocks and small whole networks on the Triton kernels, interpreted where there is no GPU, beside eager PyTorch."""

import copy
import statistics

import pytest
import torch
from support_fused import FLOOR, relative_error
from support_kernels import assert_same_bits, device
from support_nets import assert_same, perturbed, train_step
from support_triton import on_triton
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastres.nn import BasicBlock, Bottleneck, PreActBottleneck, fold, fuse, unfuse
from fastres.reference.cifar import CifarResNet
from fastres.reference.notebook import NotebookResNet
from fastres.reference.preact import PreActResNet
from fastres.reference.resnet import Bottleneck as EagerBottleneck
from fastres.reference.resnet import ResNet

# the smallest of each kind that have every kind of block, and images with odd sides all the way
NETWORKS = {
    "cifar": (lambda: CifarResNet(8, width=8), (2, 3, 11, 9)),
    "bottleneck": (lambda: ResNet(EagerBottleneck, (1, 1), stem="imagenet"), (2, 3, 21, 18)),
    "notebook": (NotebookResNet, (2, 3, 17, 14)),
    "preact": (lambda: PreActResNet(11), (2, 3, 9, 8)),
}


@pytest.fixture(autouse=True)
def triton(aten):
    with on_triton():
        yield


def twins(name: str) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """The eager network, a fused copy, and images."""
    make, shape = NETWORKS[name]
    eager, x = perturbed(make()).to(device()), torch.randn(shape).to(device())
    return eager, fuse(copy.deepcopy(eager)), x


def assert_as_good(ours: dict, theirs: dict, exact: dict, dtype: torch.dtype = torch.float32) -> None:
    """Errors of all gradients and buffers: at most twice eager's in the middle, and nowhere those of a mistake."""
    assert ours.keys() == theirs.keys() == exact.keys()
    names = [name for name, value in exact.items() if value.is_floating_point()]
    # medians, as a ReLU whose input rounds to the other side of zero puts any one gradient off by far more
    mine, eagers = ([relative_error(got[n], exact[n]) for n in names] for got in (ours, theirs))
    assert statistics.median(mine) <= max(2 * statistics.median(eagers), FLOOR[dtype])
    assert max(mine) <= max(4 * max(eagers), 1e-2)
    for name in exact.keys() - set(names):
        assert torch.equal(ours[name], exact[name])


@pytest.mark.parametrize("name", NETWORKS)
def test_a_training_step_errs_no_more_than_eagers(name):
    eager, fused, x = twins(name)
    exact = train_step(copy.deepcopy(eager).double(), x.double())
    assert_as_good(train_step(fused, x), train_step(eager, x), exact)


def test_a_training_step_in_autocast():
    eager, fused, x = twins("cifar")
    exact = train_step(copy.deepcopy(eager).double(), x.double())
    with torch.autocast(device().type, torch.bfloat16):
        ours, theirs = (train_step(model, x, lambda x, m=model: m(x).float()) for model in (fused, eager))
    assert_as_good(ours, theirs, exact, torch.bfloat16)


@pytest.mark.parametrize("name", ["cifar", "preact"])
def test_training_a_frozen_network(name):
    eager, fused, x = twins(name)
    eager.eval(), fused.eval()
    exact = train_step(copy.deepcopy(eager).double(), x.double())
    assert_as_good(train_step(fused, x), train_step(eager, x), exact)


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_evaluation_and_folding(name):
    eager, fused, x = twins(name)
    eager.eval(), fused.eval()
    exact = copy.deepcopy(eager).double()(x.double())
    eagers = relative_error(eager(x), exact)
    for model in (fused, fold(fused)):
        assert relative_error(model(x), exact) <= max(2 * eagers, 2 * FLOOR[torch.float32])


BLOCKS = {
    "basic": lambda: BasicBlock(16, 16),
    "bottleneck": lambda: Bottleneck(16, 4),
    "preact": lambda: PreActBottleneck(16, 4),
}


@pytest.fixture(params=BLOCKS)
def block(request) -> nn.Module:
    return perturbed(BLOCKS[request.param]()).to(device())


def images() -> torch.Tensor:
    """For `block`."""
    return torch.randn(2, 16, 7, 5).to(device()).contiguous(memory_format=torch.channels_last)


def test_compiles_whole(block):
    compiled, x = copy.deepcopy(block), images()
    torch._dynamo.reset()
    call = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    ours, theirs = train_step(compiled, x, call), train_step(block, x)
    tracked = {
        name for name in theirs if "running" in name
    }  # PyTorch 2.11 compiles their moving average to another rounding
    assert tracked
    for names, tolerance in ((theirs.keys() - tracked, 0), (tracked, torch.finfo(torch.float32).eps)):
        assert_same({name: ours[name] for name in names}, {name: theirs[name] for name in names}, tolerance)


def test_functional_call_with_other_parameters(block):
    x, other = images(), {name: p.detach() * 1.1 for name, p in block.named_parameters()}
    doubled = {name: p.double() for name, p in other.items()}
    expected = torch.func.functional_call(unfuse(copy.deepcopy(block)).double(), doubled, (x.double(),))
    actual = torch.func.functional_call(block, other, (x,))
    assert relative_error(actual, expected) <= 2 * FLOOR[torch.float32]


def test_checkpointing_gives_the_same_bits(block):
    twin, x = copy.deepcopy(block), images()
    ours = train_step(block, x, lambda x: checkpoint(block, x, use_reentrant=False))
    theirs = train_step(twin, x)
    for name in theirs:
        if name == "logits" or name.startswith("grad"):  # statistics may count twice, as BatchNorm's own do
            assert_same_bits(ours[name], theirs[name])
