"""Whether a module's own call may be left out because a fused operation does the same: the one place that decides.

A fused operation stands for what a class's forward says. So it may not stand for a module that has hooks, a forward or
a helper of it replaced on the class or on the instance, a weight that something else than the module computes, or a
setting that the operations do not know. Each function returns the reason why not, in words for the user, or None.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torchvision.ops import FrozenBatchNorm2d

from fastres.kernels.geometry import LARGEST_POOL
from fastres.nn.roles import (
    ACTIVATIONS,
    AVERAGES,
    CONVS,
    DROPOUTS,
    GELUS,
    IDENTITIES,
    NORMS,
    POOLS,
    RECTIFYING,
    max_pool_window,
    with_article,
)

logger = logging.getLogger("fastres")

_CALL = nn.Module.__call__
_said: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def unsupported(
    conv: nn.Module, bn: nn.Module | None = None, bias: bool = False, rectified: bool = False
) -> str | None:
    """Why the fused operations cannot stand for a convolution and its BatchNorm; None: they can.

    Args:
        bias: whether the convolution has a bias; the fused ones have none but where it stands for a BatchNorm.
        rectified: see `norm_reason`.
    """
    return conv_reason(conv, bias) or (None if bn is None else norm_reason(bn, rectified))


def conv_reason(conv: Any, bias: bool = False) -> str | None:
    """Why a convolution must be called."""
    if reason := CONVS.reason(conv):
        return reason
    if conv.groups != 1:
        return f"a convolution has groups={conv.groups}"
    if conv.dilation[0] != conv.dilation[1]:
        return f"a convolution has dilation={conv.dilation}"
    if "bias" not in conv._parameters or (conv._parameters["bias"] is None) == bias:
        return f"a convolution has {'no' if bias else 'a'} bias"
    if conv.stride[0] != conv.stride[1]:
        return f"a convolution has stride={conv.stride}"
    if conv.padding_mode != "zeros":
        return f"a convolution has padding_mode={conv.padding_mode!r}"
    return _held(conv, "weight")


def norm_reason(bn: Any, rectified: bool = False) -> str | None:
    """Why a BatchNorm must be called.

    Args:
        rectified: whether ReLU follows: it may be in the BatchNorm too.
    """
    if reason := NORMS.reason(bn) if RECTIFYING.of(type(bn)) is None else _rectifying_reason(bn, rectified):
        return reason
    buffers = bn._buffers
    if "running_mean" not in buffers or "running_var" not in buffers:
        return "a BatchNorm's running statistics are not its buffers"
    if (buffers["running_mean"] is None) != (buffers["running_var"] is None):
        return "a BatchNorm has only one of its running statistics"
    if bn.eps <= 0:
        return f"a BatchNorm has eps={bn.eps}"
    if isinstance(bn, FrozenBatchNorm2d):
        return None if "weight" in buffers and "bias" in buffers else "a BatchNorm's weight is not its buffer"
    if bn.track_running_stats and buffers["running_mean"] is None:
        return "a BatchNorm is to track statistics that it has not"
    return _held(bn, "weight") or _held(bn, "bias")


def _rectifying_reason(bn: Any, rectified: bool) -> str | None:
    if reason := RECTIFYING.reason(bn) or absent_reason(getattr(bn, "drop", None)):
        return reason
    act = getattr(bn, "act", None)
    if act is None or IDENTITIES.of(type(act)) is not None:
        return absent_reason(act)
    return activation_reason(act) or (
        None if rectified else f"{with_article(type(bn))} has an activation where none may be"
    )


def rectified_norm_reason(step: Any) -> str | None:
    """Why a module is not to be taken for a BatchNorm and a ReLU behind it."""
    if RECTIFYING.of(type(step)) is None:
        return NORMS.reason(step) or f"{with_article(type(step))} has no activation in it"
    return norm_reason(step, rectified=True) or activation_reason(getattr(step, "act", None))


def activation_reason(activation: Any, act: str = "relu") -> str | None:
    """Why an activation must be called.

    Args:
        act: which one it is to be, of `fastres.kernels.types.ACTIVATIONS`.
    """
    if act == "relu":
        return ACTIVATIONS.reason(activation)
    if reason := GELUS.reason(activation):
        return reason
    approximate = getattr(activation, "approximate", "none")
    return None if approximate == "none" else f"a GELU has approximate={approximate!r}"


def act_of(activation: Any) -> str:
    """Which activation it is, if `activation_reason` gives no reason."""
    return "relu" if GELUS.of(type(activation)) is None else "gelu"


def pool_reason(pool: Any) -> str | None:
    """Why a pool must be called: a fused one is a square max-pool without dilation, ceil mode and indices."""
    if reason := POOLS.reason(pool):
        return reason
    if not isinstance(pool, nn.MaxPool2d):
        return None
    square = all(isinstance(size, int) or size[0] == size[1] for size in (pool.kernel_size, pool.stride, pool.padding))
    if not square or pool.dilation not in (1, (1, 1)) or pool.ceil_mode or pool.return_indices:
        return f"a pool is {pool}"
    if max_pool_window(pool, (0, 0)).kernel > LARGEST_POOL:
        return f"a pool is {pool}, with more than {LARGEST_POOL} pixels a side"
    return None


def average_reason(pool: Any) -> str | None:
    """Why an average pool must be called: a fused one is global."""
    if reason := AVERAGES.reason(pool):
        return reason
    return None if pool.output_size in (1, (1, 1), [1, 1]) else f"an average pool is to {pool.output_size}"


def absent_reason(module: nn.Module | None) -> str | None:
    """Why what a forward calls besides may not be left out: it must do nothing."""
    if module is None:
        return None
    if IDENTITIES.of(type(module)):
        return IDENTITIES.reason(module)
    if DROPOUTS.of(type(module)):
        rate = module.p if hasattr(module, "p") else module.drop_prob
        return f"{type(module).__name__} is active" if module.training and rate else DROPOUTS.reason(module)
    return f"{with_article(type(module))} stands in the block"


def _held(module: Any, name: str) -> str | None:
    """Why a parameter is not to be read: it is a Parameter of the module or a parametrization's, or else a stale
    result.
    """
    if name in module._parameters:
        value = module._parameters[name]
        if value is None or is_plain(type(value)):
            return None
        if getattr(module, "_is_fsdp_managed_module", False):  # sharded for now, whole in the forward
            return None
        return f"{with_article(type(module))}'s {name} is {with_article(type(value))}"
    if "parametrizations" in module._modules and name in module._modules["parametrizations"]:
        return None
    return f"{with_article(type(module))}'s {name} is not a parameter of its own"


_plain: dict[type, bool] = {Tensor: True, nn.Parameter: True}


def is_plain(cls: type) -> bool:
    """Whether tensors of a class mean what they hold: no subclass gives operations another sense."""
    if cls not in _plain:
        _plain[cls] = issubclass(cls, (FakeTensor, FunctionalTensor))
    return _plain[cls]


def watched(x: object) -> bool:
    """Whether a call with x is traced, transformed or watched in a way that needs the modules' own calls.

    By torch.fx, torch.jit, ONNX's exporter, torch.func, forward-mode differentiation, a tensor subclass, a mode for
    functions, or hooks on all modules. torch.compile and torch.export take the fused operations as they are.
    """
    if torch.compiler.is_compiling():
        return torch.onnx.is_in_onnx_export()
    return (
        not is_plain(type(x))
        or nn.Module.__call__ is not _CALL
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or bool(torch_module._global_forward_hooks)
        or bool(torch_module._global_forward_pre_hooks)
        or bool(torch_module._global_backward_hooks)
        or bool(torch_module._global_backward_pre_hooks)
        or (torch._C._len_torch_function_stack() > 0 and _has_own_mode())
        or torch.onnx.is_in_onnx_export()
    )


def _has_own_mode() -> bool:
    return any(not isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())


def first_reason(reasons: Iterable[str | None]) -> str | None:
    """The first that there is."""
    for reason in reasons:
        if reason:
            return reason
    return None


def say_once(module: nn.Module, reason: str, what: str = "its eager forward") -> None:
    """Log that a module runs its eager forward, or a part of that; once for each module and reason."""
    if torch.compiler.is_compiling():
        return
    said = _said.setdefault(module, set())
    if reason not in said:
        said.add(reason)
        logger.warning("%s runs %s: %s", type(module).__name__, what, reason)


def said_before(module: nn.Module, reasons: Iterable[str]) -> None:
    """Keep `say_once` from saying again what was said of the whole model."""
    _said.setdefault(module, set()).update(reasons)
