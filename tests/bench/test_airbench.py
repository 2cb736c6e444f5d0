"""The baseline of airbench's class: its initial network, its rates, and a tiny run."""

import pytest
import torch
from torch import nn

from bench import accuracy, airbench
from fastres.data.dataset import make_dataset
from fastres.data.synthetic import CLASSES, LABEL, synthetic_split


def tiny_dataset():
    return make_dataset(synthetic_split(2048, seed=0), synthetic_split(20, seed=1), CLASSES, LABEL)


def test_the_network_begins_as_its_description_says():
    model = airbench.build(tiny_dataset(), 0, widths=(32, 48, 48))
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert torch.equal(model.whiten.weight[:12], -model.whiten.weight[12:]) and not model.whiten.weight.requires_grad
    for group in model.groups:
        for conv in (group.conv1, group.conv2):
            x = torch.randn(1, conv.in_channels, 5, 5)
            torch.testing.assert_close(conv(x)[:, : conv.in_channels], x)
    assert all(not m.weight.requires_grad for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_rates_rise_and_fall_and_decay_is_the_same_for_all():
    factors = [airbench.rate_factor(step, 100) for step in range(101)]
    assert factors[0] == 0.2 and factors[23] == 1.0 == max(factors) and factors[100] == pytest.approx(0.07)
    groups = airbench.optimizer_of(airbench.Airbench(widths=(24, 24, 24)), 11.5).param_groups
    assert groups[0]["lr"] == pytest.approx(64 * groups[1]["lr"]) and len(groups[0]["params"]) == 6
    products = [group["lr"] * group["weight_decay"] for group in groups]
    assert products[0] == pytest.approx(products[1])


@pytest.mark.parametrize("name", accuracy.AIRBENCH)
def test_a_recipe_has_the_arithmetic_that_is_published(name):
    recipe = accuracy.AIRBENCH[name]
    assert airbench.operations(recipe) == pytest.approx(recipe.operations, rel=0.05)


def test_the_average_sets_the_network_back():
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    average = airbench.Lookahead(model)
    with torch.no_grad():
        model.weight.add_(1)
    average.update(0.75)
    torch.testing.assert_close(model.weight.detach(), before + 0.25)
    with torch.no_grad():
        model.weight.add_(1)
    average.update(1.0)
    torch.testing.assert_close(model.weight.detach(), before + 0.25)


def test_a_tiny_run():
    recipe = airbench.Recipe((24, 24, 24), 1.5, 11.5)
    rows = airbench.rows(recipe, tiny_dataset(), 0, 2.0, 1e9, compiled=False)
    assert [row["step"] for row in rows] == [2, 3] and rows[-1]["train_seconds"] > rows[0]["train_seconds"] > 0
    assert 0 <= rows[-1]["val_accuracy"] <= 1 and 0 <= rows[-1]["tta_accuracy"] <= 1
