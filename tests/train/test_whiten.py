"""The whitening layer: its outputs are uncorrelated, of variance 1, and stay so."""

import copy

import pytest
import torch
from support_train import tiny_dataset, tiny_trainer

from fastres.data import normalise
from fastres.errors import FastresError
from fastres.reference.speed import SpeedResNet
from fastres.train.whiten import patch_covariance, whiten, whitening_filters


def test_filters_whiten():
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(4000, 12, generator=generator, dtype=torch.double) @ torch.randn(12, 12, dtype=torch.double)
    filters = whitening_filters(mixed.T @ mixed / 4000, 5, epsilon=0.0)
    outputs = mixed @ filters.T
    torch.testing.assert_close(outputs.T @ outputs / 4000, torch.eye(5, dtype=torch.double))
    variances = (filters.norm(dim=1) ** -2).tolist()
    assert variances == sorted(variances, reverse=True)


def test_covariance_counts_every_patch():
    images = torch.randn(3, 2, 5, 4, dtype=torch.double)
    patches = torch.nn.functional.unfold(images, 3).transpose(1, 2).reshape(-1, 18)
    torch.testing.assert_close(patch_covariance(images, 3), patches.T @ patches / len(patches))


def test_layer_is_whitened_and_fixed():
    dataset, model = tiny_dataset(), SpeedResNet(3, widths=(8, 8), stem=16)
    whiten(model, dataset)
    weight = model.conv1.weight
    assert not weight.requires_grad and model.conv1.bias.requires_grad
    assert torch.equal(weight[:8], -weight[8:])
    images = normalise(dataset.train.images, dataset.mean, dataset.std)
    outputs = torch.nn.functional.conv2d(images, weight[:8].detach()).permute(1, 0, 2, 3).flatten(1).double()
    covariance = outputs @ outputs.T / outputs.shape[1]
    torch.testing.assert_close(covariance, torch.eye(8, dtype=torch.double), rtol=0.05, atol=0.05)


def test_training_leaves_the_filters_alone(tmp_path):
    run = tiny_trainer(tmp_path, model="speed", whiten=True, steps=2)
    before = copy.deepcopy(run.model.conv1.state_dict())
    run.fit()
    after = run.model.conv1.state_dict()
    assert torch.equal(before["weight"], after["weight"]) and not torch.equal(before["bias"], after["bias"])


def test_a_network_without_the_layer_is_named(tmp_path):
    with pytest.raises(FastresError, match="--whiten needs a network with a whitening layer: take --model speed"):
        tiny_trainer(tmp_path, whiten=True)
