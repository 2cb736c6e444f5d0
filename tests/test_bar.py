"""The bar that all fused operations are held to: what it grants gradients of few values, and what it does not."""

from itertools import chain, repeat

import pytest
import torch
from support_fused import DRAWS, FEW_VALUES, assert_as_good_as_eager
from support_kernels import assert_as_good


class Erring(torch.autograd.Function):
    """``x + vector``, whose vector's gradient errs by ``error`` of itself."""

    @staticmethod
    def forward(ctx, x, vector, error):
        ctx.error = error
        return x + vector.to(x.dtype)

    @staticmethod
    def backward(ctx, dout):
        return dout, dout.double().sum(0).mul(1 + ctx.error).float(), None


def erring(errors, of_result=0.0):
    """A function that is exact in fp64; else each call takes the next error."""

    def call(x, vector):
        if x.dtype == torch.float64:
            return x + vector
        return Erring.apply(x, vector, next(errors)), [vector.detach() * (1 + of_result)]

    return call


def exact_too(function):
    """With the further result that the other functions have."""

    def call(x, vector):
        out = function(x, vector)
        return out if isinstance(out, tuple) else (out, [vector.detach()])

    return call


def check(ours, eager, values, of_result=0.0):
    torch.manual_seed(0)
    arguments = torch.randn(16, values).double(), torch.zeros(values).double() + 1
    fused, twin = exact_too(erring(ours, of_result)), exact_too(erring(eager))
    assert_as_good_as_eager(fused, twin, arguments, torch.bfloat16)


def lucky():
    """Errors of an eager PyTorch that is exact once."""
    return chain([0.0], repeat(0.02))


def test_luck_of_eager_in_few_values_is_no_fault():
    check(repeat(0.03), lucky(), FEW_VALUES - 1)


def test_few_values_that_err_in_every_draw_are_a_fault():
    with pytest.raises(AssertionError, match=r"tensor 2 of shape \(3,\)"):
        check(repeat(0.05), lucky(), 3)


def test_few_values_that_err_in_one_draw_by_much_are_a_fault():
    with pytest.raises(AssertionError, match=r"tensor 2 of shape \(3,\)"):
        check(chain([1.0], repeat(0.0)), lucky(), 3)


def test_many_values_have_one_draw():
    with pytest.raises(AssertionError, match="tensor 2"):
        check(iter([0.03]), iter([0.0]), FEW_VALUES)


def test_results_have_one_draw():
    with pytest.raises(AssertionError, match="tensor 3"):
        check(repeat(0.0), lucky(), 3, of_result=0.02)


def test_as_many_draws_as_said():
    spent = repeat(0.03, DRAWS)
    check(spent, lucky(), 3)
    assert next(spent, None) is None


@pytest.mark.parametrize("ours, good", [(0.0, True), (2e-3, True), (0.1, False), (float("nan"), False)])
def test_of_eager_that_is_not_finite_nothing_is_granted(ours, good):
    exact = torch.arange(1.0, 65.0)
    result, eager = (exact * (1 + error) for error in (ours, float("nan")))
    if good:
        assert_as_good(result.bfloat16(), eager.bfloat16(), exact)
    else:
        with pytest.raises(AssertionError):
            assert_as_good(result.bfloat16(), eager.bfloat16(), exact)
