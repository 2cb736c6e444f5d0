"""Every operation as a small case: fused, its eager twin and random fp64 arguments, for what holds for all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from support_fused import (
    cast,
    eager_bn_relu,
    eager_preact,
    eager_residual,
    eager_stem,
    leaves,
    random_layer,
    random_norm,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastres import ops
from fastres.ops import Conv, Identity, Layer, fused


class Case(NamedTuple):
    """``fused`` and ``eager`` take what ``make`` returns, and return the differentiable result alone."""

    fused: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    make: Callable[[], list[Any]]


class Calls(TorchDispatchMode):
    """Counts PyTorch's operators: ``found`` by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def image(*shape: int) -> Tensor:
    """fp64."""
    return torch.randn(shape, dtype=torch.float64)


def chain(x: Tensor, layers: list[Layer], **options: Any) -> Tensor:
    """Two blocks of two layers and, where there is a fifth, its projection."""
    projection = layers[4] if len(layers) > 4 else x
    return ops.residual_chain(x, [layers[:2], layers[2:4]], projection, **options)[0]


def eager_chain(x: Tensor, layers: list[Layer]) -> Tensor:
    """Its twin."""
    x = eager_residual(x, layers[:2], layers[4] if len(layers) > 4 else x)
    return eager_residual(x, layers[2:4], x)


def eager_conv_bias_act(x: Tensor, conv: Conv, bias: Tensor, residual: Tensor) -> Tensor:
    """Twin of `conv_bias_act`, NHWC in and out."""
    y = F.conv2d(x.permute(0, 3, 1, 2), conv.weight, bias.to(x.dtype), conv.stride, conv.pad[:2])
    return F.relu(y.permute(0, 2, 3, 1) + residual)


def _layers(*sizes: int, **norm: bool) -> list[Layer]:
    return [random_layer(a, b, 3 if i % 2 else 1, **norm) for i, (a, b) in enumerate(zip(sizes, sizes[1:]))]


def _chain(**norm: bool) -> list[Any]:
    return [image(2, 5, 4, 3), [*_layers(3, 4, 6, 4, 6, **norm), random_layer(3, 6, 1, **norm)]]


CASES = {
    "basic": Case(
        lambda x, layers: ops.residual_block(x, layers, x)[0],
        lambda x, layers: eager_residual(x, layers, x),
        lambda: [image(2, 5, 4, 6), _layers(6, 4, 6)],
    ),
    "frozen": Case(
        lambda x, layers: ops.residual_block(x, layers, x)[0],
        lambda x, layers: eager_residual(x, layers, x),
        lambda: [image(2, 5, 4, 6), _layers(6, 4, 6, frozen=True)],
    ),
    "added": Case(
        lambda x, layers, added: ops.residual_block(x, layers, added, relu=False)[0],
        lambda x, layers, added: eager_residual(x, layers, added, relu_last=False),
        lambda: [image(2, 5, 4, 3), _layers(3, 4, 6), image(2, 5, 4, 6)],
    ),
    "padded": Case(
        lambda x, layers: ops.residual_block(x, layers, Identity(2, 3))[0],
        lambda x, layers: eager_residual(x, layers, Identity(2, 3)),
        lambda: [image(2, 5, 4, 3), [random_layer(3, 6, 3, 2, (1, 0, 1, 1)), random_layer(6, 6, 1)]],
    ),
    "chain": Case(chain, eager_chain, _chain),
    "recompute": Case(lambda x, layers: chain(x, layers, recompute=True), eager_chain, _chain),
    "preact": Case(
        lambda x, layers, shortcut: ops.preact_block(x, layers, shortcut)[0],
        eager_preact,
        lambda: [
            image(2, 5, 4, 3),
            [layer._replace(norm=random_norm(layer.weight.shape[1])) for layer in _layers(3, 4, 6)],
            Conv(random_layer(3, 6, 1).weight),
        ],
    ),
    "stem": Case(
        lambda x, layer: ops.stem(x, layer, 3, 2, (1, 1, 1, 1))[0],
        lambda x, layer: eager_stem(x, layer, 3, 2, (1, 1, 1, 1)),
        lambda: [image(2, 7, 6, 3), random_layer(3, 5, 3)],
    ),
    "bn_relu": Case(
        lambda x, norm: ops.bn_relu(x, norm)[0], eager_bn_relu, lambda: [image(2, 5, 4, 6), random_norm(6)]
    ),
    "global_avg_pool": Case(ops.global_avg_pool, lambda x: x.mean((1, 2)), lambda: [image(2, 5, 4, 6)]),
    "conv_bias_act": Case(
        ops.conv_bias_act,
        eager_conv_bias_act,
        lambda: [image(2, 5, 4, 3), Conv(random_layer(3, 6, 3).weight, 1, (1, 1, 1, 1)), image(6), image(2, 5, 4, 6)],
    ),
}
DIFFERENTIABLE = [name for name in CASES if name != "conv_bias_act"]


def opcheck(call: Callable[[], Tensor]) -> None:
    """`torch.library.opcheck` of the custom operations that the call of a fused operation and its backward make."""
    made: list[tuple[Any, tuple]] = []

    def noted(operation: Any) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            made.append((operation, arguments))
            return operation(*arguments)

        return run

    operations = {name: noted(getattr(fused, name)) for name in ("fused_forward", "fused_backward")}
    with mock.patch.multiple(fused, **operations):
        call().sum().backward()
    assert {operation for operation, _ in made} == {fused.fused_forward, fused.fused_backward}
    for operation, arguments in made:
        values = [value.detach() if isinstance(value, Tensor) else value for value in arguments]
        values = [
            [one.detach() if isinstance(one, Tensor) else one for one in value] if isinstance(value, list) else value
            for value in values
        ]
        torch.library.opcheck(operation, values)


def arguments(name: str, dtype: torch.dtype, seed: int = 0) -> list[Any]:
    """The case's arguments in ``dtype``, leaves that need gradients; the same ones for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cast(CASES[name].make(), dtype)


def gradients(out: Tensor, values: list[Any], **options: Any) -> list[Tensor]:
    """Of all leaves among the arguments for a fixed gradient of the result."""
    dout = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device="cpu").view(out.shape).to(out.dtype)
    return list(torch.autograd.grad(out, leaves(*values), dout, **options))
