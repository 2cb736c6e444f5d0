"""Which blocks of a network run as one operation."""

import copy

import torch
from support_nets import assert_same, perturbed, train_step

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


def test_the_stages_of_a_bottleneck_network_are_chains():
    with torch.device("meta"):
        network = create_fused_model("resnet50")
    assert sizes(network) == [3, 4, 6, 3]


def test_strided_identities_join():
    assert sizes(fuse(NotebookResNet())) == [2, 2]
    assert sizes(fuse(CifarResNet(14, width=8))) == [6]


def test_long_stages_are_cut():
    with torch.device("meta"):
        network = create_fused_model("resnet101")
    assert sizes(network) == [3, 4, LONGEST, LONGEST, 23 - 2 * LONGEST, 3]


def test_plain_networks_have_no_chains():
    network = fuse(CifarResNet(14, width=8, residual=False))
    assert sizes(network) == [1] * 6


def test_what_a_block_keeps_and_its_hooks_part_chains():
    with torch.device("meta"):
        network = create_fused_model("resnet50")
    network.layer1[2].recompute = True
    handle = network.layer3[1].register_forward_hook(lambda *_: None)
    assert has_hooks(network.layer3[1]) and not has_hooks(network.layer3[0])
    assert sizes(network) == [2, 1, 4, 1, 1, 4, 3]
    handle.remove()
    assert sizes(network) == [2, 1, 4, 6, 3]


def test_a_network_computes_the_same_however_its_blocks_are_chained():
    chained = perturbed(fuse(CifarResNet(20, width=8)).double())
    parted, eager = copy.deepcopy(chained), unfuse(copy.deepcopy(chained))
    for block in blocks_of(parted):
        block.register_forward_hook(lambda *_: None)
    assert sizes(chained) == [LONGEST, 1] and sizes(parted) == [1] * 9
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    steps = [train_step(network, x) for network in (chained, parted, eager)]
    assert_same(steps[0], steps[1], 1e-12)
    assert_same(steps[0], steps[2], 1e-10)
