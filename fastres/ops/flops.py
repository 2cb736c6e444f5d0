"""What `torch.utils.flop_counter.FlopCounterMode` counts for the fused operations: eager PyTorch's own figure.

That is two FLOPs a multiply-add of each convolution, forward, and as many for its gradient at its input and at its
weight. What is recomputed in backward is not counted: the figure is the network's, whatever it keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch.utils.flop_counter import register_flop_formula

import fastres.ops.conv_bias_act
import fastres.ops.fused  # noqa: F401 - the formulas need the operations
from fastres.ops.nodes import Conv
from fastres.ops.plan import Code, Plan, Shape, decode


def _counted(name: str) -> Callable:
    """Decorator: register a formula, which is given shapes for tensors, for the operation ``fastres::name``."""
    return register_flop_formula(getattr(torch.ops.fastres, name))


def _conv_flops(plan: Plan, x: Shape, weights: list[Shape]) -> list[int]:
    return [2 * prod(out[:3]) * prod(weight) for _, weight, out in plan.convolutions(x, weights)]


@_counted("fused_forward")
def fused_forward(structure, integers, numbers, x, added, known, parameters, *_, **__):
    """See `fastres.ops.fused.fused_forward`."""
    code = Code(structure, integers, numbers)
    weights = [shape for kind, shape in zip(code.parameters, parameters) if kind == "w"]
    return sum(_conv_flops(decode(code), x, weights))


@_counted("fused_backward")
def fused_backward(structure, integers, numbers, dout, x, out, saved, needs, **_):
    """See `fastres.ops.fused.fused_backward`: x's own gradient, and a weight's, only where needed."""
    plan = decode(Code(structure, integers, numbers))
    need_x, _, *need_weights = needs
    readers = plan.readers_of_x
    return sum(
        flops * ((need_x or place not in readers) + need_weight)
        for place, (flops, need_weight) in enumerate(zip(_conv_flops(plan, x, saved), need_weights))
    )


@_counted("conv_bias_act")
def conv_bias_act(x, w, bias, geometry, *_, **__):
    """See `fastres.ops.conv_bias_act`."""
    stride, *pad, dilation = geometry
    return _conv_flops(Plan((Conv(stride, tuple(pad), dilation),)), x, [w])[0]
