"""Learning-rate schedules against values worked out by hand."""

import math

import pytest

from fastres.train.schedule import lr_factor, parse_milestones


@pytest.mark.parametrize("step", [0, 37, 99])
def test_constant_ignores_warmup(step):
    assert lr_factor("constant", step, 100, 0.5) == 1.0


@pytest.mark.parametrize(
    "step, expected",
    [(0, 0.1), (4, 0.5), (9, 1.0), (10, 1.0), (55, 0.5), (99, 0.5 * (1 + math.cos(math.pi * 89 / 90)))],
)
def test_cosine_with_warmup(step, expected):
    assert lr_factor("cosine", step, 100, 0.1) == pytest.approx(expected)


@pytest.mark.parametrize("step, expected", [(0, 0.2 + 0.8 / 20), (19, 1.0), (20, 1.0), (60, 0.5), (99, 1 / 80)])
def test_triangular(step, expected):
    assert lr_factor("triangular", step, 100, 0.2) == pytest.approx(expected)


@pytest.mark.parametrize("step, expected", [(0, 1.0), (49, 1.0), (50, 0.1), (74, 0.1), (75, 0.01), (99, 0.01)])
def test_step_divides_by_ten_at_half_and_three_quarters(step, expected):
    assert lr_factor("step", step, 100, 0.0) == pytest.approx(expected)


@pytest.mark.parametrize("step, expected", [(29, 1.0), (30, 0.2), (60, 0.04), (80, 0.008)])
def test_milestones_of_another_recipe(step, expected):
    shares = parse_milestones("0.3,0.6,0.8")
    assert lr_factor("step", step, 100, 0.0, shares, 0.2) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "step", "triangular"])
@pytest.mark.parametrize("warmup", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("total", [1, 2, 7])
def test_always_a_share_of_the_peak(schedule, warmup, total):
    factors = [lr_factor(schedule, step, total, warmup) for step in range(total)]
    assert all(0 < factor <= 1 for factor in factors)
