"""The speed network: shapes, parts, and the fused form of its blocks."""

import copy

import pytest
import torch
from support_nets import assert_same, train_step

from fastres import fuse
from fastres.models import create_model
from fastres.nn import BasicBlock
from fastres.nn.report import report
from fastres.reference.speed import ResidualConv, SmoothBlock, SpeedResNet


def test_shapes_and_size():
    model = create_model("speed", num_classes=7).eval()
    for side in (8, 16, 24, 32, 33):
        assert model(torch.zeros(2, 3, side, side)).shape == (2, 7)
    x = torch.zeros(1, 3, 32, 32)
    for part, side in ((model.conv1, 15), *zip(model.stages, (15, 7, 3))):
        x = part(x)
        assert x.shape[2:] == (side, side)
    kernels = 9 * sum(i * o + 2 * o * o for i, o in ((48, 32), (32, 64), (64, 128)))
    others = 48 * (27 + 1) + 3 * 2 * (32 + 64 + 128) + (128 + 1) * 7
    assert sum(p.numel() for p in model.parameters()) == kernels + others


@pytest.mark.parametrize("name, width", [("speed94", 64), ("speed95", 96), ("speed96", 128)])
def test_wide_networks_whiten_at_full_resolution(name, width):
    model, x = create_model(name).eval(), torch.zeros(1, 3, 32, 32)
    for part, channels, side in (
        (model.conv1, 24, 31), *zip(model.stages, (width, 2 * width, 4 * width), (15, 7, 3)),
    ):  # fmt: skip
        x = part(x)
        assert x.shape == (1, channels, side, side)
    assert create_model(name, num_classes=7).eval()(torch.zeros(2, 3, 9, 10)).shape == (2, 7)


@pytest.mark.parametrize("name, layers", [("speed", 2), ("speed94", 2), ("", 1)])
def test_fused_blocks_compute_the_same(name, layers):
    torch.manual_seed(0)
    eager = (
        create_model(name).double() if name else SpeedResNet(widths=(8, 12), layers=layers, patch=2, stride=1).double()
    )
    fused = fuse(copy.deepcopy(eager))
    assert isinstance(fused.stages[1][1], {"speed": BasicBlock, "speed94": SmoothBlock, "": ResidualConv}[name])
    assert "left" not in str(report(fused))
    x = torch.randn(4, 3, 16, 16).double()
    assert_same(train_step(fused, x), train_step(eager, x), 1e-10)


def test_checkpointing_changes_nothing():
    torch.manual_seed(0)
    stored = create_model("speed").double()
    recomputed = create_model("speed", checkpoint_every=1).double()
    recomputed.load_state_dict(stored.state_dict())
    x = torch.randn(4, 3, 16, 16).double()
    assert_same(train_step(recomputed, x), train_step(stored, x), 1e-12)


@pytest.mark.parametrize("layers, act", [(1, "gelu"), (3, "relu"), (2, "silu")])
def test_unknown_blocks_are_refused(layers, act):
    with pytest.raises(ValueError, match=f"blocks of {layers} convolutions with '{act}': take"):
        SpeedResNet(layers=layers, act=act)
