"""A process of the tests of synchronised BatchNorm; a module of its own, as spawned processes import it."""

from __future__ import annotations

from typing import Any

import support_process
import torch
import torch.distributed as dist
from support_nets import assert_same, twins
from torch import Tensor, nn

from fastres import ops
from fastres.nn import ConvBNReLU, fuse
from fastres.reference.resnet import BasicBlock, ResNet

# network, options of fuse, dtype, implementation, tolerance
CASES = (
    ("cifar", {"recompute": True}, torch.float64, "aten", 1e-9),
    ("notebook", {}, torch.float64, "aten", 1e-9),
    ("cifar", {}, torch.float32, "auto", 2e-3),
    ("preact", {}, torch.float64, "aten", 1e-9),
    ("bottleneck", {}, torch.float64, "aten", 1e-9),
)
to_sync = nn.SyncBatchNorm.convert_sync_batchnorm


def run(rank: int, ranks: int, meeting_file: str, batches: list[int]) -> None:
    """Every check over all ranks; rank r has ``batches[r]`` images."""
    support_process.begin()
    dist.init_process_group("gloo", init_method=f"file://{meeting_file}", rank=rank, world_size=ranks)
    own = slice(sum(batches[:rank]), sum(batches[: rank + 1]))
    try:
        for case in CASES if ranks == 2 else CASES[-2:]:
            joined_batch(own, sum(batches), *case)
        with ops.implementation("aten"):
            one_pixel_each(rank, ranks)
            far_from_zero(own, sum(batches))
            evaluation(own, sum(batches))
            part_of_the_ranks(rank)
    finally:
        dist.destroy_process_group()


def joined_batch(
    own: slice,
    count: int,
    name: str,
    options: dict[str, Any],
    dtype: torch.dtype,
    implementation: str,
    tolerance: float,
) -> None:
    """Two steps of the fused network over all ranks equal those of its eager twin on all images at once."""
    torch.manual_seed(0)
    eager, fused = twins(name, dtype, **options)
    fused = to_sync(fused)
    with ops.implementation(implementation):
        for _ in range(2):
            x, weights = torch.randn(count, 3, 12, 11, dtype=dtype), torch.randn(count, 10, dtype=dtype)
            expected = step(eager, x, weights)
            expected["result"] = expected["result"][own]
            assert_same(over_ranks(step(fused, x[own], weights[own])), expected, tolerance)


def step(module: nn.Module, x: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Result, gradients, and buffers afterwards, of the loss ``sum(module(x) * weights)``."""
    module.zero_grad()
    result = module(x)
    (result.flatten(1) * weights).sum().backward()
    grads = {f"grad of {name}": p.grad.clone() for name, p in module.named_parameters()}
    return {"result": result.detach(), **grads, **{name: b.clone() for name, b in module.named_buffers()}}


def over_ranks(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """With gradients added up, as the losses are."""
    for name, value in values.items():
        if name.startswith("grad"):
            dist.all_reduce(value)
    return values


def one_pixel_each(rank: int, ranks: int) -> None:
    """A rank may have less than BatchNorm alone could take its statistics of, but not nothing."""
    torch.manual_seed(0)
    layer = ConvBNReLU(3, 5, 1).double()
    x, weights = torch.randn(ranks, 3, 1, 1).double(), torch.randn(ranks, 5).double()
    expected = step(nn.Sequential(layer.conv, layer.bn, nn.ReLU()), x, weights)
    expected = [value[rank : rank + 1] if name == "result" else value for name, value in expected.items()]
    layer.bn.reset_running_stats()
    actual = over_ranks(step(to_sync(layer), x[rank : rank + 1], weights[rank : rank + 1]))
    assert_same(dict(enumerate(actual.values())), dict(enumerate(expected)), 1e-9)
    try:
        layer(torch.randn(0, 3, 1, 1).double())
    except ValueError as error:
        assert "Expected more than 0 value per channel" in str(error)
    else:
        raise AssertionError("a rank without images was not refused")


def far_from_zero(own: slice, count: int) -> None:
    """The variance keeps its digits where the mean is a thousand deviations, in fp32."""
    torch.manual_seed(0)
    layer = to_sync(ConvBNReLU(3, 3, 1))
    nn.init.eye_(layer.conv.weight[:, :, 0, 0].detach())
    x = torch.randn(count, 3, 6, 5) + 1000
    layer(x[own])
    expected = x.double().transpose(0, 1).flatten(1).var(1)
    moved = (layer.bn.running_var.double() - 0.9) / 0.1
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=0)


def evaluation(own: slice, count: int) -> None:
    """In evaluation, and frozen in training, running statistics are used: no rank waits for another."""
    torch.manual_seed(0)
    plain = fuse(ResNet(BasicBlock, (1, 1), stem="cifar")).double()
    x = torch.randn(count, 3, 9, 9).double()
    expected = plain.eval()(x)[own]
    synchronised = to_sync(plain)
    torch.testing.assert_close(synchronised(x[own]), expected, rtol=1e-9, atol=1e-9)
    if dist.get_rank() == 0:
        synchronised(x[own])


def part_of_the_ranks(rank: int) -> None:
    """A group of its own, as ``convert_sync_batchnorm(model, group)`` asks for; blocks of two groups are refused."""
    group = dist.new_group([0, 1])
    if rank > 1:
        return
    torch.manual_seed(0)
    eager = ResNet(BasicBlock, (1, 1), stem="cifar").double()
    x = torch.randn(4, 3, 9, 9).double()
    expected = eager(x).detach()
    fused = fuse(to_sync(eager, group))
    torch.testing.assert_close(fused(x[2 * rank :][:2]).detach(), expected[2 * rank :][:2], rtol=1e-9, atol=1e-9)
    fused.layer1[0].bn2 = nn.BatchNorm2d(64).double()
    try:
        fused.layer1[0](torch.randn(2, 64, 5, 5).double())
    except ValueError as error:
        assert "one process group, or none" in str(error)
    else:
        raise AssertionError("a block of two groups was not refused")
