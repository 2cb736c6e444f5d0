"""The speed network: shapes, parts, and the fused form of its blocks."""

import torch

from fastres.models import create_fused_model, create_model
from fastres.nn import blocks
from support_nets import assert_same, train_step


def test_shapes_and_size():
    model = create_model("speed", num_classes=7).eval()
    for side in (16, 24, 32, 33):
        assert model(torch.zeros(2, 3, side, side)).shape == (2, 7)
    assert model.conv1(torch.zeros(1, 3, 32, 32)).shape[2:] == (16, 16)
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 1.5e6


def test_fused_blocks_compute_the_same():
    torch.manual_seed(0)
    eager = create_model("speed").double()
    fused = create_fused_model("speed").double()
    fused.load_state_dict(eager.state_dict())
    assert type(fused.layer2[0]) is blocks.BasicBlock
    x = torch.randn(4, 3, 16, 16).double()
    assert_same(train_step(fused, x), train_step(eager, x), 1e-10)


def test_checkpointing_changes_nothing():
    torch.manual_seed(0)
    stored = create_model("speed").double()
    recomputed = create_model("speed", checkpoint_every=1).double()
    recomputed.load_state_dict(stored.state_dict())
    x = torch.randn(4, 3, 16, 16).double()
    assert_same(train_step(recomputed, x), train_step(stored, x), 1e-12)
