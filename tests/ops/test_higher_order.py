"""Gradients of gradients, transforms of `torch.func` and forward-mode differentiation: as PyTorch's own functions have
them.
"""

import pytest
import torch
from support_fused import FLOOR, leaves, random_norm, relative_error, with_grads
from support_ops import CASES, DIFFERENTIABLE, arguments, gradients, image
from torch import Tensor
from torch.autograd import forward_ad

from fastres import ops
from fastres.ops import Conv, Norm, cpu


def rebuilt(template, values):
    """The nest of arguments with its tensors that need gradients taken from an iterator."""
    if isinstance(template, Tensor):
        return next(values) if template.requires_grad else template
    if isinstance(template, list):
        return [rebuilt(part, values) for part in template]
    if isinstance(template, tuple) and hasattr(template, "_fields"):
        return type(template)(*(rebuilt(part, values) for part in template))
    return template


def of_leaves(function, values):
    """The function of the tensors that need gradients alone."""
    return lambda *tensors: function(*rebuilt(values, iter(tensors)))


def both(name, dtype=torch.float64):
    """Fused and eager form as functions of the same tensors."""
    values = arguments(name, dtype)
    case = CASES[name]
    return of_leaves(case.fused, values), of_leaves(case.eager, values), leaves(*values)


def assert_close(ours, theirs, dtype=torch.float64):
    ours, theirs = (torch.utils._pytree.tree_leaves(t) for t in (ours, theirs))
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a - b).norm() <= 10 * FLOOR[dtype] * (1 + b.norm())


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradgradcheck(name):
    fused, _, tensors = both(name)
    fast = dict(fast_mode=True, atol=1e-4)
    assert torch.autograd.gradcheck(fused, tensors, check_forward_ad=True, check_batched_grad=True, **fast)
    assert torch.autograd.gradgradcheck(fused, tensors, **fast)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_gradient_penalty_errs_no_more_than_eagers(name, dtype):
    def penalty(function):
        def penalised(*values):
            out = function(*values)
            found = gradients(out, values, create_graph=True)
            return sum(g.double().square().sum() for g in found) + out.double().square().mean()

        return penalised

    case, values = CASES[name], arguments(name, dtype)
    exact, ours, theirs = (
        with_grads(penalty(function), values, precision, torch.ones((), dtype=torch.float64))
        for function, precision in ((case.eager, torch.float64), (case.fused, dtype), (case.eager, dtype))
    )
    for a, b, e in zip(ours, theirs, exact, strict=True):
        assert relative_error(a, e) <= max(2 * relative_error(b, e), 2 * FLOOR[dtype])


def test_without_a_graph_gradients_are_those_of_the_operation():
    for name in DIFFERENTIABLE:
        values = arguments(name, torch.float32)
        plain = gradients(CASES[name].fused(*values), values)
        recorded = gradients(CASES[name].fused(*values), values, create_graph=True)
        assert name == "global_avg_pool" or any(g.requires_grad for g in recorded)
        assert not any(g.requires_grad for g in plain)
        assert_close([g.detach() for g in recorded], plain, torch.float32)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_hessian_vector_product(name):
    fused, eager, tensors = both(name)
    vectors = tuple(torch.randn_like(t) for t in tensors)

    def product(function):
        return torch.autograd.functional.hvp(lambda *t: function(*t).square().sum(), tuple(tensors), vectors)

    assert_close(product(fused), product(eager))


@pytest.mark.parametrize("name", CASES)
def test_transforms(name):
    fused, eager, tensors = both(name)
    tensors = [t.detach() for t in tensors]
    stacked = [torch.stack([t, t + 0.1]) for t in tensors]
    tangents = tuple(torch.randn_like(t) for t in tensors)

    def results(function):
        def loss(*t):
            return function(*t).square().sum()

        yield torch.func.grad(loss, tuple(range(len(tensors))))(*tensors)
        yield torch.func.vmap(function)(*stacked)
        yield torch.func.vmap(torch.func.grad(loss))(*stacked)
        yield torch.func.jvp(function, tuple(tensors), tangents)
        yield torch.func.jvp(torch.func.grad(loss), tuple(tensors), tangents)
        _, pull = torch.func.vjp(function, *tensors)
        yield pull(torch.ones_like(function(*tensors)))
        with forward_ad.dual_level():
            dual = tuple(forward_ad.unpack_dual(function(*map(forward_ad.make_dual, tensors, tangents))))
        yield dual

    for ours, theirs in zip(results(fused), results(eager), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_batched_gradients(name):
    fused, eager, tensors = both(name)

    def found(function):
        out = function(*tensors)
        douts = torch.stack([torch.ones_like(out), out.detach()])
        return torch.autograd.grad(out, tensors, douts, is_grads_batched=True)

    assert_close(found(fused), found(eager))


def test_what_one_input_is_made_of_another_counts_once():
    x, norm = image(2, 3, 3, 4).requires_grad_(), random_norm(4)

    def loss(function):
        y = x * 2
        norm_of_y = Norm(y.square().mean((0, 1, 2)), norm.beta)
        out = function(y, norm_of_y)
        (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)

    assert_close(loss(CASES["bn_relu"].fused), loss(CASES["bn_relu"].eager))


def test_some_gradients_alone():
    for name in DIFFERENTIABLE:
        fused, eager, tensors = both(name)
        for wanted in tensors:
            ours, theirs = (
                torch.autograd.grad(f(*tensors).square().sum(), wanted, create_graph=True)[0] for f in (fused, eager)
            )
            assert_close(ours, theirs)


def test_a_parameter_changed_in_between_is_an_error():
    fused, _, tensors = both("basic")
    out = fused(*tensors)
    with torch.no_grad():
        tensors[2].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.sum(), tensors[0], create_graph=True)


def test_ranks_have_first_derivatives_only(monkeypatch):
    monkeypatch.setattr("fastres.ops.backends.aten.Aten.all_reduce", lambda self, tensor, group: None)
    x = image(2, 3, 3, 4).requires_grad_()
    norm = random_norm(4)._replace(group="two")
    out, _ = ops.bn_relu(x, norm)
    torch.autograd.grad(out.sum(), x, retain_graph=True)
    with pytest.raises(RuntimeError, match="fastres.nn.unfuse"):
        torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="fastres.nn.unfuse"):
        torch.func.vmap(lambda x: ops.bn_relu(x, norm)[0])(x[None])


@pytest.mark.parametrize("packed", [False, True])
def test_a_folded_convolution_has_eagers_gradients(packed):
    x, conv, bias, added = arguments("conv_bias_act", torch.float32)
    frozen = Conv(conv.weight.detach(), *conv[1:]), bias.detach()

    def found(function):
        out = function(x, *frozen, added.detach())
        return torch.autograd.grad(out.square().sum(), x)

    options = {"packed": cpu.PackedConv()} if packed else {}
    with torch.no_grad():
        ops.conv_bias_act(x, *frozen, added, **options)
    ours = found(lambda *a: ops.conv_bias_act(*a, **options))
    assert_close(ours, found(CASES["conv_bias_act"].eager), torch.float32)
    if packed:
        nchw = x.permute(0, 3, 1, 2), frozen[0].weight, frozen[1], added.detach().permute(0, 3, 1, 2)
        assert ops.repeat_conv_bias_act(*nchw, True, options["packed"]) is None


@pytest.mark.parametrize("name", CASES)
def test_statistics_of_the_plain_form(name):
    """They move running statistics as the operation's own do."""
    if name in ("global_avg_pool", "conv_bias_act"):
        return
    values = arguments(name, torch.float32)

    def of(x):
        if name == "stem":
            return [ops.stem(x, values[1], 3, 2, (1, 1, 1, 1))[1]]
        if name == "bn_relu":
            return [ops.bn_relu(x, values[1])[1]]
        if name == "preact":
            out, coef, used = ops.preact_block(x, *values[1:], next_coef=True)
            return [*used, ops.Statistics(coef, out.numel() // out.shape[3])]
        return ops.residual_block(x, values[1][:2])[1]

    with torch.no_grad():
        ours = of(values[0])
    with forward_ad.dual_level():
        plain = of(values[0])
    assert [one.count for one in ours] == [one.count for one in plain]
    for a, b in zip(ours, plain):
        assert_close(b.coef, a.coef, torch.float32)
