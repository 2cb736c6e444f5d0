"""Which blocks of a network run as one operation."""

import copy

import pytest
import torch
import torchvision
from support_nets import assert_same, perturbed, train_step
from torch import nn
from torchvision.models.resnet import Bottleneck

from fastres.models.fused import create_fused_model
from fastres.nn import fuse, unfuse
from fastres.nn.blocks import LONGEST, chains
from fastres.nn.roles import has_hooks
from fastres.reference.cifar import CifarResNet
from fastres.reference.notebook import NotebookResNet


def blocks_of(network) -> list:
    return [block for name, stage in network.named_children() if name.startswith("layer") for block in stage]


def sizes(network) -> list[int]:
    return [max(1, len(chain.structures)) for chain in chains(blocks_of(network))]


def test_chains_of_bottlenecks_go_on_behind_a_projection():
    with torch.device("meta"):
        network = create_fused_model("resnet50")
    assert sizes(network) == [LONGEST, LONGEST]


def test_stages_whose_tensors_would_take_more_memory_at_once_are_chains_apart():
    with torch.device("meta"):
        basic, few = create_fused_model("resnet34"), fuse(bottlenecks(2, 2, 2, 2))
        sparing = create_fused_model("resnet50")
    for block in blocks_of(sparing):
        block.recompute = True
    assert sizes(basic) == sizes(sparing) == [3, 4, 6, 3] and sizes(few) == [2, 2, 2, 2]


def bottlenecks(*stages: int) -> nn.Module:
    return torchvision.models.ResNet(Bottleneck, list(stages), num_classes=5, width_per_group=8)


def test_strided_identities_join():
    assert sizes(fuse(NotebookResNet())) == [2, 2]
    assert sizes(fuse(CifarResNet(14, width=8))) == [6]


def test_long_chains_are_cut():
    with torch.device("meta"):
        network = create_fused_model("resnet101")
    assert sizes(network) == [LONGEST] * 4 + [1]


def test_plain_networks_have_no_chains():
    network = fuse(CifarResNet(14, width=8, residual=False))
    assert sizes(network) == [1] * 6


def test_what_a_block_keeps_and_its_hooks_part_chains():
    with torch.device("meta"):
        network = create_fused_model("resnet50")
    network.layer1[2].recompute = True
    handle = network.layer3[1].register_forward_hook(lambda *_: None)
    assert has_hooks(network.layer3[1]) and not has_hooks(network.layer3[0])
    assert sizes(network) == [2, 1, 5, 1, 7]
    handle.remove()
    assert sizes(network) == [2, 1, LONGEST, 2, 3]


def test_a_network_computes_the_same_however_its_blocks_are_chained():
    chained = perturbed(fuse(CifarResNet(20, width=8)).double())
    parted, eager = copy.deepcopy(chained), unfuse(copy.deepcopy(chained))
    for block in blocks_of(parted):
        block.register_forward_hook(lambda *_: None)
    assert sizes(chained) == [LONGEST, 1] and sizes(parted) == [1] * 9
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    assert_same_steps(x, chained, parted, eager)


def assert_same_steps(x, chained, parted, eager):
    steps = [train_step(network, x) for network in (chained, parted, eager)]
    assert_same(steps[0], steps[1], 1e-12)
    assert_same(steps[0], steps[2], 1e-10)


@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_so_does_one_of_bottlenecks(act):
    model = bottlenecks(3, 1, 2, 1)
    if act == "gelu":
        for module in model.modules():
            if isinstance(module, Bottleneck):
                module.relu = nn.GELU()
    chained = perturbed(fuse(model).double())
    parted, eager = copy.deepcopy(chained), unfuse(copy.deepcopy(chained))
    for block in blocks_of(parted):
        block.register_forward_hook(lambda *_: None)
    assert sizes(chained) == [7] and sizes(parted) == [1] * 7
    assert_same_steps(torch.randn(2, 3, 40, 40, dtype=torch.float64), chained, parted, eager)


def test_a_projection_that_something_waits_for_begins_a_chain():
    model = fuse(bottlenecks(3, 1, 1, 1))
    assert sizes(model) == [6]
    handle = model.layer3[0].downsample[1].register_forward_hook(lambda *_: None)
    assert sizes(model) == [4, 1, 1]
    handle.remove()
    assert sizes(model) == [6]
