"""The speed network: shapes, parts, and the fused form of its blocks."""

import torch
from support_nets import assert_same, train_step

from fastres.models import create_fused_model, create_model
from fastres.nn import BasicBlock


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


def test_fused_blocks_compute_the_same():
    torch.manual_seed(0)
    eager = create_model("speed").double()
    fused = create_fused_model("speed").double()
    fused.load_state_dict(eager.state_dict())
    assert type(fused.stages[1][1]) is BasicBlock
    x = torch.randn(4, 3, 16, 16).double()
    assert_same(train_step(fused, x), train_step(eager, x), 1e-10)


def test_checkpointing_changes_nothing():
    torch.manual_seed(0)
    stored = create_model("speed").double()
    recomputed = create_model("speed", checkpoint_every=1).double()
    recomputed.load_state_dict(stored.state_dict())
    x = torch.randn(4, 3, 16, 16).double()
    assert_same(train_step(recomputed, x), train_step(stored, x), 1e-12)
