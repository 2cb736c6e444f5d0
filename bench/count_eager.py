"""Bytes that eager PyTorch moves through a GPU's memory, counted call by call from the shapes.

Each ATen call is a kernel that reads each of its input tensors once and writes each of its outputs once, but for these:

=============================  ==================================================================================
``convolution_backward``       two kernels of the vendor's library: the data gradient reads the result's gradient
                               and the weight, the weight gradient the result's gradient, once more, and the input.
``native_batch_norm``          in training reads its input twice: the statistics must be known before the first
                               element can be normalised, and no layer of these networks fits on chip.
``native_batch_norm_backward`` in training reads the gradient and the input twice each, for the same reason: two
                               sums per channel, then the gradient.
views, `empty`, `detach`       nothing.
=============================  ==================================================================================

That each kernel reads everything once and no more is the best that a kernel can do, so the count is a lower bound.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.blocks import train
from bench.count_saved import saved_bytes

_aten = torch.ops.aten
_FREE = {
    _aten.detach.default,
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_strided.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
    _aten._unsafe_view.default,
    _aten.lift_fresh.default,
}


class CallTraffic(NamedTuple):
    """One kernel of the library and the bytes that it moves."""

    kernel: str
    loaded: int
    stored: int


class EagerTraffic(TorchDispatchMode):
    """While active, appends every ATen call that moves bytes to ``calls``; fused operations are looked into."""

    def __init__(self):
        super().__init__()
        self.calls: list[CallTraffic] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fastres":
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        result = func(*args, **kwargs)
        if not func.is_view and func not in _FREE and func.namespace == "aten":
            self.calls += _kernels(func, args, kwargs, result)
        return result


def traffic(module: nn.Module, x: Tensor, dtype: torch.dtype) -> list[CallTraffic]:
    """Traffic of a training step of a module under autocast; nothing is computed."""
    fake, module, x = fakes(module, x)
    with fake, EagerTraffic() as mode:
        train(module, x, dtype)
    return mode.calls


def saved(module: nn.Module, x: Tensor, dtype: torch.dtype) -> int:
    """`saved_bytes` of a module; nothing is computed."""
    fake, module, x = fakes(module, x)
    with fake:
        return saved_bytes(module, x, dtype)


def fakes(module: nn.Module, x: Tensor) -> tuple[FakeTensorMode, nn.Module, Tensor]:
    """The mode under which fakes of the module and the input compute nothing but shapes, and these."""
    fake, module = FakeTensorMode(), copy.deepcopy(module)
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(fake.from_tensor(parameter.detach())))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, fake.from_tensor(buffer))
    return fake, module, fake.from_tensor(x.detach()).requires_grad_(x.requires_grad)


def _kernels(func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> list[CallTraffic]:
    name = str(func.overloadpacket).removeprefix("aten.")
    if func is _aten.convolution_backward.default:
        dy, x, w = args[:3]
        dx, dw, _ = result
        halves = [("dgrad", (dy, w), dx), ("wgrad", (dy, x), dw)]
        return [CallTraffic(f"{name} {half}", _bytes(ins), _bytes(out)) for half, ins, out in halves if out is not None]
    loaded = _bytes((args, kwargs))
    if func is _aten.native_batch_norm.default and args[5]:
        loaded += _bytes(args[0])
    if func is _aten.native_batch_norm_backward.default and args[7]:
        loaded += _bytes(args[:2])
    return [CallTraffic(name, loaded, _bytes(result))]


def _bytes(values: Any) -> int:
    """Bytes of the distinct tensors in nested containers."""
    return sum(t.nbytes for t in {id(t): t for t in tree_leaves(values) if isinstance(t, Tensor)}.values())
