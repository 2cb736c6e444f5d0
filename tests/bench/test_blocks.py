"""Networks taken apart: every one of the registry that fuses, and nothing of it twice or left out."""

import pytest
import torch
from torch import nn

from bench.blocks import fused, parts_of
from bench.counted import NETWORKS
from bench.machine import networks
from fastres.models import create_model, model_names
from fastres.nn import blocks

DEEP = {"resnet1202", "resnet110", "preact_resnet1001", "resnet152"}  # slow, and of the same layers as others
HEADS = {"fc", "bn"}  # what no part has: the last layer, and the BatchNorm behind pre-activation blocks


def test_every_network_of_the_registry_can_be_counted():
    assert {one.model for one in NETWORKS.values()} == set(model_names())
    assert {*networks.SHOWN} < {*NETWORKS}


@pytest.mark.parametrize("name", sorted({*NETWORKS} - DEEP))
def test_parts_have_all_layers_of_their_network_once(name):
    one = NETWORKS[name]
    with torch.device("meta"):
        parts, model = parts_of(one.model, one.size, **one.options), create_model(one.model, **one.options)
    kinds = (nn.Conv2d, nn.BatchNorm2d)
    layers = [repr(m) for path, m in model.named_modules() if isinstance(m, kinds) and path not in HEADS]
    assert sorted(repr(m) for part in parts for m in part.modules.modules() if isinstance(m, kinds)) == sorted(layers)
    assert [part.stem for part in parts] == [True] + [False] * (len(parts) - 1)
    assert parts[0].shape == (3, one.size, one.size) and len(parts) >= 3


@pytest.mark.parametrize("name, size", [("speed94", 16), ("notebook", 48), ("preact_resnet164", 8)])
def test_parts_make_what_their_network_makes(name, size):
    """Eager as well as fused, whose blocks and stem run the fused operations."""
    torch.manual_seed(0)
    parts = parts_of(name, size)
    torch.manual_seed(0)
    model = create_model(name).to(memory_format=torch.channels_last)
    made = []
    behind = getattr(model, "bn", model.avgpool)
    behind.register_forward_hook(lambda module, inputs, output: made.append(inputs[0]))
    x = torch.randn(2, 3, size, size).contiguous(memory_format=torch.channels_last)
    model(x)
    whole = fused if name != "preact_resnet164" else None  # whose stages are counted with undefined statistics
    for form in filter(None, (lambda part: part.modules, whole)):
        y = x
        for part in parts:
            y = form(part)(y)
        torch.testing.assert_close(y, made[0], rtol=1e-3, atol=1e-3)


def test_a_stage_is_what_one_module_holds():
    parts = parts_of("speed94", 32)
    assert [(part.name, part.blocks, part.shape) for part in parts] == [
        ("stem", 1, (3, 32, 32)), ("stages.0.0", 2, (24, 31, 31)), ("stages.1.0", 2, (64, 15, 15)),
        ("stages.2.0", 2, (128, 7, 7)),
    ]  # fmt: skip
    assert all(blocks.must_be_called(fused(part).blocks[0]) for part in parts[1:])  # first layers with a pool
