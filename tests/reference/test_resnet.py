"""ResNet-18 to 152: torchvision's keys, sizes and logits; both stems; plain twins."""

import copy

import pytest
import torch
import torchvision
from support_nets import assert_same, perturbed, train_step
from torch import nn

from fastres.reference.resnet import resnet, resnet8

# as published in torchvision's documentation of the weights
PARAMETERS = {18: 11_689_512, 34: 21_797_672, 50: 25_557_032, 101: 44_549_160, 152: 60_192_808}


def theirs(depth: int) -> nn.Module:
    torch.manual_seed(depth)
    return perturbed(getattr(torchvision.models, f"resnet{depth}")())


def ours(their_model: nn.Module, depth: int, **options) -> nn.Module:
    """Our network with a copy of torchvision's weights, loaded strictly, so all keys and shapes are equal."""
    with torch.device("meta"):  # the initial weights are not needed
        model = resnet(depth, num_classes=1000, **options)
    assert list(model.state_dict()) == list(their_model.state_dict())
    model.load_state_dict(copy.deepcopy(their_model.state_dict()), assign=True)
    return model


@pytest.mark.parametrize("depth", PARAMETERS)
def test_logits_with_torchvisions_weights(depth):
    their_model = theirs(depth).eval()
    our_model = ours(their_model, depth).eval()
    assert sum(p.numel() for p in our_model.parameters()) == PARAMETERS[depth]
    x = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        expected = their_model(x)
        torch.testing.assert_close(our_model(x), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("depth", [18, 50])
def test_a_training_step_with_torchvisions_weights(depth):
    their_model = theirs(depth).double().train()
    our_model = ours(their_model, depth).train()
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    assert_same(train_step(our_model, x), train_step(their_model, x), 1e-9)


@pytest.mark.parametrize("depth", [18, 50])
def test_the_cifar_stem_is_one_3x3_convolution(depth):
    their_model = theirs(depth)
    their_model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    their_model.maxpool = nn.Identity()
    their_model.eval()
    our_model = ours(their_model, depth, stem="cifar").eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = their_model(x)
        torch.testing.assert_close(our_model(x), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_initial_weights_are_torchvisions():
    torch.manual_seed(3)
    expected = torchvision.models.resnet18(num_classes=10).state_dict()
    torch.manual_seed(3)
    for name, value in resnet(18).state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("depth, norm", [(18, "bn2"), (50, "bn3")])
def test_zero_init_residual_starts_each_block_as_its_shortcut(depth, norm):
    model = resnet(depth, stem="cifar", zero_init_residual=True)
    block = model.layer1[1].eval()
    assert not getattr(block, norm).weight.any()
    x = torch.rand(2, block.conv1.in_channels, 4, 4)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize("depth", [18, 50])
def test_the_plain_twin_has_no_shortcut(depth):
    plain, residual = (resnet(depth, stem="cifar", residual=r) for r in (False, True))
    names = {name for name in residual.state_dict() if "downsample" not in name}
    assert plain.state_dict().keys() == names
    block = plain.layer1[1].eval()
    norm = block.bn3 if depth == 50 else block.bn2
    nn.init.zeros_(norm.weight)
    assert not block(torch.rand(2, block.conv1.in_channels, 4, 4)).any()  # nothing goes around the convolutions


def test_resnet8_has_three_blocks_behind_a_halving_stem():
    model, shapes = resnet8().eval(), []
    for stage in (model.layer1, model.layer2, model.layer3):
        stage[-1].register_forward_hook(lambda module, inputs, out: shapes.append(tuple(out.shape[1:])))
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert shapes == [(64, 16, 16), (128, 8, 8), (256, 4, 4)]


def test_an_unknown_stem_is_named():
    with pytest.raises(ValueError, match="stem 'mnist' is unknown: choose imagenet, cifar or halving"):
        resnet(18, stem="mnist")
