"""Every fused operation: one autograd Function around two custom operations, which torch.compile keeps whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres.ops import plain
from fastres.ops.backends.fake import Fake
from fastres.ops.backends.protocol import Backend
from fastres.ops.layers import Statistics, contiguous, dense, in_autocast, nhwc_weights, weight_grad
from fastres.ops.nodes import End
from fastres.ops.operation import direct, isolated, operation
from fastres.ops.plan import Code, Plan, decode
from fastres.ops.schedule import Backward, Forward
from fastres.ops.select import backend_for


def fused(
    plan: Plan,
    x: Tensor,
    parameters: Sequence[Tensor | None],
    added: Tensor | None = None,
    known: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """The result of a plan, differentiable, and the coefficients [5, C] of its BatchNorms in order.

    Args:
        x: [N, H, W, C].
        parameters: of each node in order: a convolution's weight [Cout, Cin, KH, KW] in any memory format, and gamma,
            beta, running mean and running variance [C] of a BatchNorm, each of which may be None.
        added: a tensor that is the first block's shortcut.
        known: [5, C] that begins with x's mean and biased variance, where those are known.
    """
    x = in_autocast(x).contiguous()
    added = None if added is None else in_autocast(added).contiguous()
    if plain.is_needed(x, added):
        return plain.run(plan, x, parameters, added)
    recording = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, added, *parameters))
    out, *coefs = _Fused.apply(plan, recording, x, added, None if known is None else known.contiguous(), *parameters)
    return out, coefs


class Planned(NamedTuple):
    """An operation that is checked for inputs of one shape, dtype and device, to be run on any of them.

    Attributes:
        plan, parameters: see `fused`.
        counts: pixels that each BatchNorm sees, in order.
    """

    plan: Plan
    parameters: list[Tensor | None]
    counts: list[int]

    def run(self, x: Tensor, added: Tensor | None = None, known: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """See `fused`."""
        return fused(self.plan, x, self.parameters, added, known)

    def statistics(self, coefs: Sequence[Tensor]) -> list[Statistics]:
        """Each BatchNorm's, in order, of a run's coefficients."""
        return [Statistics(*pair) for pair in zip(coefs, self.counts)]


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        recording: bool,
        x: Tensor,
        added: Tensor | None,
        known: Tensor | None,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, ...]:
        code = plan.encode() if torch.compiler.is_compiling() else plan.code
        letters, n_coefs = code.parameters, code.counts[1]
        own = [t for kind, t in zip(letters, parameters) if kind == "w" and t is not None]
        weights = _nhwc(own, x)
        cast = iter(weights)
        given = [next(cast) if kind == "w" and t is not None else t for kind, t in zip(letters, parameters)]
        out, *rest = direct(fused_forward, x)(*code, x, added, known, given, recording)
        coefs, kept = rest[len(rest) - n_coefs :], rest[: len(rest) - n_coefs]
        last = plan.nodes[-1]
        masks = isinstance(last, End) and last.relu
        # their casts are computed again too
        ctx.saves_parameters = plan.recompute or any(one.dtype != x.dtype for one in weights)
        weights = own if ctx.saves_parameters else weights
        ctx.save_for_backward(x, out if masks else None, *weights, *coefs, *kept)
        ctx.mark_non_differentiable(*coefs)
        if not torch.compiler.is_compiling():  # which has no such method
            ctx.set_materialize_grads(False)  # of the coefficients there is none: no zeros are to be filled in
        ctx.plan, ctx.code, ctx.letters, ctx.has_added = plan, code, letters, added is not None
        ctx.dtypes = [None if t is None else t.dtype for t in parameters]
        ctx.parameters = plain.Parameters.of(parameters) if recording else None
        return out, *coefs

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
        if dout is None:
            return (None,) * len(ctx.needs_input_grad)
        dout = dense(dout)
        x, out, *saved = ctx.saved_tensors
        first = ctx.code.counts[0]  # behind the weights
        weights = _nhwc(saved[:first], x) if ctx.saves_parameters else saved[:first]
        x, out, *saved = contiguous([x, out, *weights, *saved[first:]])
        _, _, need_x, need_added, _, *need_parameters = ctx.needs_input_grad
        if plain.is_differentiated(dout):
            dx, dadded, *grads = _differentiable(ctx, x, out, saved, dout)
            return None, None, dx, dadded, None, *grads
        need_weights = [need for kind, need in zip(ctx.letters, need_parameters) if kind == "w"]
        found = iter(direct(fused_backward, x)(*ctx.code, dout, x, out, saved, [need_x, need_added, *need_weights]))
        channels = [coef.shape[1] for coef in saved[first : first + ctx.code.nodes.count("n")] for _ in range(2)]
        vectors = iter(next(found).split(channels))
        dx = next(found) if need_x else None
        dadded = next(found) if need_added else None
        grads = []
        for kind, dtype, need in zip(ctx.letters, ctx.dtypes, need_parameters):
            grad = None
            if kind == "w" and need:
                grad = weight_grad(next(found), dtype)
            elif kind in "gb":
                vector = next(vectors)
                grad = None if not need else vector if vector.dtype == dtype else vector.to(dtype)
            grads.append(grad)
        return None, None, dx, dadded, None, *grads


def _nhwc(weights: Sequence[Tensor], x: Tensor) -> list[Tensor]:
    """The weights as the operations on x take them."""
    rounded = not torch.compiler.is_compiling() and backend_for(x).rounds_weights(x.dtype)
    return nhwc_weights(weights, x.dtype, rounded)


def _differentiable(
    ctx: Any, x: Tensor, out: Tensor | None, saved: Sequence[Tensor], dout: Tensor
) -> list[Tensor | None]:
    """The gradients of x, of the shortcut and of the parameters, from PyTorch's own functions."""
    added = result = None
    if ctx.has_added:  # it was not kept, as only its gradient counts
        place = ctx.plan.first_end
        result = out if place is None else saved[sum(ctx.code.counts) + place]
        added = x.new_zeros((dout if result is None else result).shape, requires_grad=True)
    _, _, need_x, need_added, _, *needs = ctx.needs_input_grad
    return plain.plan_gradients(
        ctx.plan, [x, added, *ctx.parameters.tensors()], [need_x, need_added, *needs], dout, result
    )


@operation("fused_forward")
def fused_forward(
    structure: str,
    integers: list[int],
    numbers: list[float],
    x: Tensor,
    added: Tensor | None,
    known: Tensor | None,
    parameters: list[Tensor | None],
    recording: bool,
) -> list[Tensor]:
    """The result of the plan of that code; with ``recording`` what backward needs; the coefficients.

    Args:
        x, added, known: see `fused`.
        parameters: see `fused`, but weights are [Cout, KH, KW, Cin] in x's dtype, or in fp32 where the backend
            `rounds_weights`.
    """
    with isolated(x):
        p, code = backend_for(x), Code(structure, integers, numbers)
        key, inputs = ("forward", *code.key, recording), [x, added, known, *parameters]
        return p.repeated(key, inputs, lambda: _results(p, code, x, added, known, parameters, recording))


@fused_forward.register_fake
def _(structure, integers, numbers, x, added, known, parameters, recording):
    return _results(Fake(), Code(structure, integers, numbers), x, added, known, parameters, recording)


def _results(
    p: Backend,
    code: Code,
    x: Tensor,
    added: Tensor | None,
    known: Tensor | None,
    parameters: Sequence[Tensor | None],
    recording: bool,
) -> list[Tensor]:
    plan = decode(code)
    walk = Forward(p, plan.group, parameters, added, recording)
    return [walk.run(plan.nodes, x, known), *walk.kept, *walk.coefs]


@operation("fused_backward")
def fused_backward(
    structure: str,
    integers: list[int],
    numbers: list[float],
    dout: Tensor,
    x: Tensor,
    out: Tensor | None,
    saved: list[Tensor],
    needs: list[bool],
) -> list[Tensor]:
    """The gradients of `fused_forward`: those of all gammas and betas in one vector, then those of ``needs``.

    Args:
        out: the result, where a ReLU made it.
        saved: the weights, the coefficients and what forward kept.
        needs: whether the gradients of x, of the shortcut that is a tensor and of each weight are needed.
    """
    with isolated(x):
        p, code = backend_for(x), Code(structure, integers, numbers)
        key, inputs = ("backward", *code.key, *needs), [dout, x, out, *saved]
        return p.repeated(key, inputs, lambda: _gradients(p, code, dout, x, out, saved, needs))


@fused_backward.register_fake
def _(structure, integers, numbers, dout, x, out, saved, needs):
    return _gradients(Fake(), Code(structure, integers, numbers), dout, x, out, saved, needs)


def _gradients(
    p: Backend,
    code: Code,
    dout: Tensor,
    x: Tensor,
    out: Tensor | None,
    saved: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor]:
    n_weights, n_coefs = code.counts
    weights, coefs, kept = saved[:n_weights], saved[n_weights : n_weights + n_coefs], saved[n_weights + n_coefs :]
    walk = Backward(p, decode(code), weights, coefs, kept, needs)
    walk.run(x, out, dout)
    return walk.gradients()
