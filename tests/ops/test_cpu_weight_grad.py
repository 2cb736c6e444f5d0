"""The compiled weight gradient in bf16: against fp64, its units of images and rows, threads, infinities, its use."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support_conv import Problem, problems, taken_tiles
from support_flat import Flat, aten
from support_fused import FLOOR, relative_error
from support_kernels import few_examples

from fastres.ops import cpu
from fastres.ops.backends.cpp import Cpp
from fastres.ops.cpu import tiles

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="no C++ compiler")
BF16 = torch.bfloat16


def made(*sizes, normalised=True):
    """Input, coefficients, gradient at the output and weight of a problem of bf16 tensors."""
    problem = Problem(*sizes, dtype=BF16, seed=1, rank=0)
    return problem.x(), problem.coef() if normalised else None, problem.y(7), problem.w(), problem.stride, problem.pad


def weight_grad(x, coef, dy, w, stride, pad, dilation=1):
    problem = tiles.sizes(tuple(x.shape), tuple(w.shape), stride, pad, dilation)
    return tiles.weight_grad(x, coef, dy, None, None, problem)


def exact(x, coef, dy, w, stride, pad, dilation=1):
    """In fp64; and PyTorch's own gradient in bf16."""
    results = []
    for dtype in (torch.float64, BF16):
        a = (
            x.to(dtype)
            if coef is None
            else aten.bn_add_relu(x.to(dtype), coef.to(torch.promote_types(dtype, coef.dtype)))
        )
        leaf = w.to(dtype).permute(0, 3, 1, 2).contiguous().requires_grad_()
        padded = F.pad(a.to(dtype), (0, 0, pad[1], pad[3], pad[0], pad[2])).permute(0, 3, 1, 2)
        y = F.conv2d(padded, leaf, stride=stride, dilation=dilation)
        (grad,) = torch.autograd.grad(y, leaf, dy.to(dtype).permute(0, 3, 1, 2))
        results.append(grad.permute(0, 2, 3, 1))
    return results


def assert_good(arguments):
    reference, eager = exact(*arguments)
    ours = weight_grad(*arguments)
    assert ours.dtype == torch.float32 and ours.shape == reference.shape
    # only the normalised input is rounded before the products
    bound = 2e-6 if arguments[1] is None else max(relative_error(eager, reference), FLOOR[BF16] / 4)
    assert relative_error(ours, reference) <= bound


@few_examples
@given(problems(), st.booleans(), st.sampled_from([5, 17, 48, 54, 70, 130]))
def test_drawn_problems(problem, normalised, inputs):
    problem = problem._replace(dtype=BF16, inputs=inputs)
    coef = problem.coef() if normalised else None
    geometry = problem.stride, problem.pad, problem.dilation
    assert_good((problem.x(), coef, problem.y(7), problem.w(), *geometry))


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize(
    "sizes",
    [
        (9, (12, 10), 64, 64, 3, 1, (1, 1, 1, 1)),  # several units of pairs of images, the last one odd
        (3, (48, 47), 80, 20, 3, 1, (1, 1, 1, 1)),  # several units of rows
        (2, (49, 50), 72, 24, 5, 2, (2, 2, 2, 2)),
        (2, (60, 61), 96, 130, 1, 2, (0, 0, 0, 0)),
        (64, (2, 2), 200, 100, 3, 1, (1, 1, 1, 1)),  # most taps are padding
        (5, (32, 31), 16, 16, 3, 1, (1, 1, 1, 1)),  # inputs and outputs that are one vector, or less
        (5, (9, 12), 13, 11, 3, 2, (1, 1, 1, 1)),
        (5, (9, 12), 64, 16, 1, 1, (0, 0, 0, 0)),
        (5, (9, 12), 40, 9, 3, 1, (1, 1, 1, 1)),
        (5, (9, 12), 16, 64, 1, 1, (0, 0, 0, 0)),
        (3, (49, 60), 3, 64, 7, 2, (3, 3, 3, 3)),  # few channels: several units of rows, the last image alone
        (4, (13, 12), 3, 32, 5, 2, (1, 1, 2, 2)),
        (9, (40, 56), 3, 70, 3, 1, (1, 1, 1, 1)),
        (2, (6, 7), 9, 20, 1, 1, (0, 0, 0, 0)),
        (1, (5, 7), 1, 8, 3, 2, (1, 1, 1, 1)),
        (1, (2, 1), 4, 40, 5, 1, (2, 2, 2, 2)),  # windows larger than the image
        (2, (11, 9), 3, 17, 3, 3, (0, 0, 0, 0)),  # pixels that no window reads
    ],
    ids=str,
)
def test_units(sizes, normalised):
    assert_good(made(*sizes, normalised=normalised))


@pytest.mark.parametrize("stride, dilation", [(1, 2), (1, 5), (2, 3)])
def test_units_with_taps_apart(stride, dilation):
    pad = (dilation,) * 4
    sizes = 3, (48, 47), 80, 20, 3, stride, pad, BF16, 1, 0, dilation
    problem = Problem(*sizes)
    assert_good((problem.x(), problem.coef(), problem.y(7), problem.w(), stride, pad, dilation))


@pytest.mark.parametrize("form", list(tiles.FORMS))
@pytest.mark.parametrize(
    "sizes",
    [
        (3, (4, 23), 400, 36, 3, 1, (1, 1, 1, 1)),  # a gradient a thread
        (3, (4, 23), 400, 800, 3, 1, (1, 1, 1, 1)),  # one gradient, as it is large
        (3, (7, 9), 800, 656, 1, 1, (0, 0, 0, 0)),  # one gradient, as there are few pixels
        (3, (17, 30), 40, 36, 1, 1, (0, 0, 0, 0)),  # rows of pixels for each thread
        (1, (1, 3), 40, 36, 1, 1, (0, 0, 0, 0)),  # fewer than threads
        (3, (14, 13), 3, 36, 3, 1, (1, 1, 1, 1)),  # few channels
    ],
    ids=str,
)
def test_threads(sizes, form):
    """More than there are rows of pairs, too; the same threads give the same."""
    arguments, before, results = made(*sizes), torch.get_num_threads(), {}
    with taken_tiles(form):
        try:
            for threads in (1, 2, 5, 11):
                torch.set_num_threads(threads)
                results[threads] = weight_grad(*arguments)
                assert torch.equal(results[threads], weight_grad(*arguments))
        finally:
            torch.set_num_threads(before)
    for result in results.values():
        assert relative_error(result, results[1].double()) < 1e-6


def test_nan_and_infinity_reach_only_their_channels():
    x, coef, dy, w, stride, pad = made(3, (5, 4), 20, 10, 3, 1, (1, 1, 1, 1))
    for value in (float("nan"), float("inf")):
        bad = x.clone()
        bad[2, 2, 2, 5] = value  # of the image without a partner
        dw = weight_grad(bad, None, dy.abs() + 1, w, stride, pad)
        broken = (~dw.isfinite()).flatten(0, 2).any(0)
        assert broken.tolist() == [channel == 5 for channel in range(20)]
    frozen = torch.zeros(5, 20)
    frozen[3] = 1
    bad[2, 2, 2, 5] = -float("inf")  # which ReLU makes 0
    assert weight_grad(bad, frozen, dy, w, stride, pad).isfinite().all()


@pytest.mark.parametrize("inputs, used", [(64, True), (16, True), (3, False), (18, False)])
def test_where_it_is_used(inputs, used, monkeypatch):
    """Elsewhere the gradient is PyTorch's, and the same but for rounding."""
    x, coef, dy, w, stride, pad = made(3, (8, 9), inputs, 24, 3, 2, (1, 1, 1, 1))
    calls, real, p = [], tiles.weight_grad, Flat(Cpp())
    monkeypatch.setattr(tiles, "form", lambda: 0)
    monkeypatch.setattr(tiles, "weight_grad", lambda *arguments: calls.append(1) or real(*arguments))
    ours = p.conv_wgrad(dy, None, None, x, coef, stride, pad, (3, 3))
    assert bool(calls) == used
    monkeypatch.setattr(tiles, "form", lambda: None)
    theirs = p.conv_wgrad(dy, None, None, x, coef, stride, pad, (3, 3))
    assert len(calls) == used
    assert relative_error(ours, theirs.double()) < FLOOR[BF16]


@pytest.mark.skipif(
    cpu.unavailable() is not None or tiles.answer("form") < tiles.FORMS["avx512"],
    reason="the CPU has no vectors for bf16",
)
@pytest.mark.parametrize("normalised, dilation, used", [(False, 1, True), (True, 1, False), (False, 2, False)])
def test_few_channels_become_rows(normalised, dilation, used, monkeypatch):
    """Behind a BatchNorm whose gradient is made on the way; with an activation in front, or taps apart, PyTorch's."""
    pad = (dilation,) * 4
    problem = Problem(3, (15, 14), 3, 24, 3, 2, pad, BF16, 1, 0, dilation)
    y, abc = problem.y(8), torch.randn(3, 24, generator=torch.Generator().manual_seed(2))
    calls, real, p = [], tiles.weight_grad, Flat(Cpp())
    monkeypatch.setattr(tiles, "form", lambda: tiles.FORMS["avx512"])
    monkeypatch.setattr(tiles, "weight_grad", lambda *arguments: calls.append(1) or real(*arguments))
    arguments = problem.y(7), y, abc, problem.x(), problem.coef() if normalised else None, 2, pad, (3, 3)
    ours = p.conv_wgrad(*arguments, dilation=dilation)
    assert bool(calls) == used
    monkeypatch.setattr(tiles, "form", lambda: None)
    theirs = p.conv_wgrad(*arguments, dilation=dilation)
    assert relative_error(ours, theirs.double()) < FLOOR[BF16]
