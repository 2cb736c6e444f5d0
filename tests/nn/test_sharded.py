"""Sharded modules (FSDP2) before and after `fuse`, in one process."""

import pytest
import torch
import torch.distributed as dist
from support_nets import perturbed
from torch import nn
from torch.distributed.fsdp import fully_shard
from torchvision.models.resnet import BasicBlock, ResNet

from fastres.nn import fuse, report, unfuse
from fastres.nn.classes import Fused


@pytest.fixture(autouse=True)
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def network():
    torch.manual_seed(0)
    return perturbed(ResNet(BasicBlock, [2, 1, 1, 1], num_classes=3)).double()


def shard(model, whole):
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    if not whole:
        for module in model.modules():
            if isinstance(module, BasicBlock):
                fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def losses(model, dtype=torch.float64, autocast=False):
    """Of three steps."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    found = []
    for _ in range(3):
        images = torch.randn(4, 3, 32, 32, dtype=torch.float64).to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(images).to(dtype).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("whole", [True, False], ids=["network", "blocks"])
@pytest.mark.parametrize("first", ["fuse", "shard"])
def test_trains_as_eager_and_unfuses(first, whole):
    eager, model = network(), network()
    expected = losses(eager)
    for step in ("fuse", "shard") if first == "fuse" else ("shard", "fuse"):
        model = fuse(model) if step == "fuse" else shard(model, whole)
    assert report(model).fused_blocks == 5 and not report(model).left
    assert losses(model) == pytest.approx(expected, rel=1e-6)
    unfuse(model)
    assert not any(isinstance(module, Fused) for module in model.modules())
    assert type(model).__name__ == "FSDPResNet" and not report(model).fused_blocks
    assert losses(model) == pytest.approx(losses(eager), rel=1e-4)


@pytest.mark.parametrize("whole", [True, False], ids=["network", "blocks"])
def test_recomputing_reads_the_weights_as_they_are_gathered_again(whole):
    """Under autocast backward casts the weights itself, whose memory is let go between forward and backward."""
    expected = losses(fuse(network().float()), torch.float32, autocast=True)
    model = shard(fuse(network().float(), recompute=True), whole)
    assert losses(model, torch.float32, autocast=True) == expected


def test_data_parallel_in_a_process_group():
    """`fuse` comes after the wrapper, which has noted the strides of the parameters: they must not change."""
    expected = losses(network())
    for inner in (False, True):
        model = nn.parallel.DistributedDataParallel(network())
        fuse(model.module.layer1 if inner else model)
        assert losses(model) == pytest.approx(expected, rel=1e-6)
        assert not any(isinstance(module, Fused) for module in unfuse(model).modules())
