"""BatchNorm inside a fused module behaves as ``nn.BatchNorm2d`` in every mode."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from support_flat import aten
from support_nets import perturbed
from torch import nn

from fastres.nn import ConvBNReLU
from fastres.nn.bypass import unsupported
from fastres.nn.norm import to_nhwc, track
from fastres.ops import Statistics
from fastres.reference.notebook import SameConv2d


def eager(module: ConvBNReLU, x):
    return F.relu(module.bn(module.conv(x)))


def assert_same_steps(module: ConvBNReLU, steps: int = 3) -> None:
    """Outputs, gradients and buffers over several batches, and in evaluation after them."""
    fused, twin = module.double(), copy.deepcopy(module).double()
    for _ in range(steps):
        x = torch.randn(3, 4, 6, 5, dtype=torch.float64)
        ours, theirs = fused(x), eager(twin, x)
        torch.testing.assert_close(ours, theirs)
        for model, out in ((fused, ours), (twin, theirs)):
            model.zero_grad()
            out.square().sum().backward()
        for a, b in zip(fused.parameters(), twin.parameters()):
            torch.testing.assert_close(a.grad, b.grad)
        for a, b in zip(fused.buffers(), twin.buffers()):
            torch.testing.assert_close(a, b)
    fused.eval(), twin.eval()
    torch.testing.assert_close(fused(x), eager(twin, x))


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(eps=1e-2, momentum=0.3),
        dict(momentum=None),
        dict(momentum=0.0),
        dict(affine=False),
        dict(track_running_stats=False),
    ],
    ids=str,
)
def test_every_kind_of_norm(options):
    module = ConvBNReLU(4, 6, 3)
    module.bn = nn.BatchNorm2d(6, **options)
    assert_same_steps(module)


def test_frozen_norm_in_a_training_module():
    module = perturbed(ConvBNReLU(4, 6, 3))
    module.bn.eval()
    assert_same_steps(module)
    assert module.bn.num_batches_tracked == 0


def test_statistics_withheld_for_a_while():
    """What a recomputing checkpoint does to keep a second forward out of the statistics."""
    module = perturbed(ConvBNReLU(4, 6, 3))
    module.bn.track_running_stats = False
    before = copy.deepcopy(module.state_dict())
    assert_same_steps(module)
    assert all(
        torch.equal(value, before[name]) for name, value in module.double().state_dict().items() if "run" in name
    )


def test_counter_counts():
    module = ConvBNReLU(4, 6, 3)
    for _ in range(3):
        module(torch.randn(2, 4, 5, 5))
    assert module.bn.num_batches_tracked == 3
    module.eval()(torch.randn(2, 4, 5, 5))
    assert module.bn.num_batches_tracked == 3


def test_whole_bf16_modules_keep_bf16_statistics():
    module = ConvBNReLU(4, 6, 3).bfloat16()
    out = module(torch.randn(2, 4, 5, 5).bfloat16())
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert {t.dtype for t in (*module.parameters(), module.bn.running_mean)} == {torch.bfloat16}
    assert all(p.grad.dtype == torch.bfloat16 for p in module.parameters())


@pytest.mark.parametrize(
    "conv, reason",
    [
        (nn.Conv2d(4, 4, 3, groups=2, bias=False), "groups=2"),
        (nn.Conv2d(4, 4, 3, dilation=(2, 1), bias=False), r"dilation=\(2, 1\)"),
        (nn.Conv2d(4, 4, 3), "bias"),
        (nn.Conv2d(4, 4, 3, (1, 2), bias=False), r"stride=\(1, 2\)"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", bias=False), "padding_mode='reflect'"),
        (nn.Conv1d(4, 4, 3), "Conv1d is not nn.Conv2d"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_fused_says_why(conv, reason):
    assert re.search(reason, unsupported(conv, nn.BatchNorm2d(4)))


def test_what_can_be_fused():
    for conv in (
        nn.Conv2d(4, 4, 3, bias=False),
        nn.Conv2d(4, 4, (3, 1), 2, bias=False),
        SameConv2d(4, 4, 3),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3, bias=False)),
    ):
        assert unsupported(conv, nn.BatchNorm2d(4)) is None
    assert unsupported(nn.Conv2d(4, 4, 3, bias=False), nn.SyncBatchNorm(4)) is None
    assert "InstanceNorm2d" in unsupported(nn.Conv2d(4, 4, 3, bias=False), nn.InstanceNorm2d(4))


@pytest.mark.parametrize("padding", [0, (2, 1), "same", "valid"], ids=str)
def test_paddings(padding):
    module = ConvBNReLU(4, 6, 3)
    module.conv = nn.Conv2d(4, 6, (5, 3), padding=padding, bias=False)
    assert_same_steps(module, steps=1)


def test_a_norm_that_is_used_twice_moves_twice():
    bn, twin = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    batches = [torch.randn(2, 3, 4, 4) + shift for shift in (1.0, -2.0)]
    for y in batches:
        twin(y)
    track([bn, bn], [Statistics(aten.finalize(aten.moments(to_nhwc(y)), None, None, 1e-5), 32) for y in batches])
    for ours, theirs in zip(bn.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)
