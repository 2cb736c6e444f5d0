"""The weight average against the formula."""

import copy

import torch
from torch import nn

from fastres.train.average import WeightAverage


def test_average_of_weights_and_statistics():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    average = WeightAverage(model, 0.8)
    expected = None
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        model(torch.randn(5, 3, generator=generator, dtype=torch.double))
        average.update()
        now = {name: value.clone() for name, value in model.state_dict().items()}
        expected = now if expected is None else {n: 0.8 * expected[n] + 0.2 * now[n] for n in now}
    got = average.module.state_dict()
    assert got.pop("1.num_batches_tracked") == 4 and expected.pop("1.num_batches_tracked") > 0
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert not any(p.requires_grad for p in average.module.parameters())


def test_a_restored_average_does_not_start_again():
    model = nn.Linear(2, 2)
    first = WeightAverage(model, 0.9)
    first.update()
    second = WeightAverage(copy.deepcopy(model), 0.9)
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    twin = WeightAverage(model, 0.9)
    twin.load_state_dict(second.state_dict())
    twin.update()
    torch.testing.assert_close(model.weight - twin.module.weight, torch.full((2, 2), 0.9))
