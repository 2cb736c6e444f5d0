"""Whether a module's own call may be left out because a fused operation does the same: the one place that decides.

A fused operation stands for what a class's forward says. So it may not stand for a module that has hooks, a forward or
a helper of it replaced on the class or on the instance, a weight that something else than the module computes, or a
setting that the operations do not know. Each function returns the reason why not, in words for the user, or None.
"""

from __future__ import annotations

import inspect
import logging
import types
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
from torchvision.ops import FrozenBatchNorm2d, StochasticDepth

from fastres.reference.cifar import PaddedShortcut
from fastres.reference.notebook import SameConv2d, SameMaxPool2d, Subsample
from fastres.reference.speed import HalvingPool

logger = logging.getLogger("fastres")

_CALL = nn.Module.__call__
_CALLERS = frozenset(("_call_impl", "_wrapped_call_impl"))
_said: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


class Known:
    """A class whose forward the fused operations can do, as it was when this was made.

    Args:
        cls: the class.
    """

    def __init__(self, cls: type[nn.Module]):
        self.cls = cls
        self.methods = _methods_of(cls)
        self.names = _CALLERS.union(self.methods)
        self._on_top: dict[type, str | None] = {}

    def changed(self, module: nn.Module, running: bool = False) -> str | None:
        """Whether its forward, or a method that this calls, is another than the class's.

        Args:
            running: whether this is asked in the class's forward, so that one of the instance, if any, calls it.
        """
        cls = type(module)
        if cls.__call__ is not nn.Module.__call__:
            return f"{cls.__name__} has a __call__ of its own"
        if cls not in self._on_top:
            self._on_top[cls] = _own_above_fused(cls, self.names)
        if self._on_top[cls] is not None:
            return f"{cls.__name__} has a {self._on_top[cls]} of its own"
        cls = eager_class(cls)
        for name, function in self.methods.items():
            if getattr(cls, name) is not function:
                return f"{cls.__name__} has a {name} of its own"
        own = module.__dict__
        if torch.compiler.is_compiling():  # torch.compile traces no isdisjoint of a __dict__
            changed = [name for name in self.methods if name in own]
        else:
            changed = [] if self.names.isdisjoint(own) else sorted(self.names & own.keys())
        if running and changed == ["forward"]:
            return None
        return f"{_a(cls)} has an instance's {' and '.join(changed)}" if changed else None

    def reason(self, module: nn.Module) -> str | None:
        """Why the module must be called."""
        if has_hooks(module):
            return f"{_a(type(module))} has hooks"
        return self.changed(module)


def _a(cls: type) -> str:
    return f"{'an' if cls.__name__[0] in 'AEIOU' else 'a'} {cls.__name__}"


def eager_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class itself, or of a fused one that which it was made of."""
    return getattr(cls, "_eager", cls)


def _own_above_fused(cls: type[nn.Module], names: frozenset[str]) -> str | None:
    """The first of the methods that a class, put on top of a fused one, has itself."""
    if not hasattr(cls, "_eager"):
        return None
    for base in cls.__mro__:
        if "_eager" in vars(base):
            return None
        if own := names.intersection(vars(base)):
            return min(own)
    return None


def _methods_of(cls: type[nn.Module]) -> dict[str, types.FunctionType]:
    """The class's forward and the methods that it calls, directly or through others, by name."""
    found, names = {}, ["forward"]
    while names:
        name = names.pop()
        if name in found:
            continue
        for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:  # all of them, as one may call super()
            function = vars(base).get(name)
            if isinstance(function, types.FunctionType):
                found[name] = getattr(cls, name)
                names.extend(inspect.unwrap(function).__code__.co_names)
    return found


def is_original(cls: type) -> bool:
    """Whether a class that is known by its name is a module with the forward of its own file."""
    return issubclass(cls, nn.Module) and getattr(vars(cls).get("forward"), "__module__", None) == cls.__module__


class Kind:
    """Classes that one role in a fused operation accepts, and subclasses of them that change nothing in it."""

    def __init__(self, role: str, *classes: type[nn.Module]):
        self.role = role
        self._known = {cls: Known(cls) for cls in classes}
        self._named: set[tuple[str, str]] = set()
        self._found: dict[type, Known | None] = {}

    def add_named(self, module: str, *names: str) -> None:
        """Accept classes by their module and names: of a library that is imported later, or never."""
        self._named.update((module, name) for name in names)
        self._found.clear()

    def of(self, cls: type) -> Known | None:
        """What is known of a class."""
        if cls not in self._found:
            bases = [self._of_itself(base) for base in cls.__mro__]
            self._found[cls] = next((known for known in bases if known is not None), None)
        return self._found[cls]

    def _of_itself(self, cls: type) -> Known | None:
        if cls not in self._known and (cls.__module__, cls.__qualname__) in self._named and is_original(cls):
            self._known[cls] = Known(cls)
        return self._known.get(cls)

    def reason(self, module: Any) -> str | None:
        """Why the module must be called."""
        known = self.of(type(module))
        if known is None:
            return f"{type(module).__name__} is not {self.role}"
        return known.reason(module)


CONVS = Kind("nn.Conv2d", nn.Conv2d, SameConv2d)
NORMS = Kind("nn.BatchNorm2d", nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)
RECTIFYING = Kind("a BatchNorm with an activation in it")  # `drop` and `act`, which its forward calls
ACTIVATIONS = Kind("nn.ReLU", nn.ReLU)
POOLS = Kind("nn.MaxPool2d", nn.MaxPool2d, SameMaxPool2d, HalvingPool)
AVERAGES = Kind("nn.AdaptiveAvgPool2d", nn.AdaptiveAvgPool2d)
CONTAINERS = Kind("nn.Sequential", nn.Sequential)
HOLDERS = Kind("a module that only calls those that it holds", nn.Sequential)
IDENTITIES = Kind("nn.Identity", nn.Identity)
SHORTCUTS = Kind("a shortcut without parameters", Subsample, PaddedShortcut)
DROPOUTS = Kind("a dropout", nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout, StochasticDepth)


def has_hooks(module: nn.Module) -> bool:
    """Whether something waits for the module's own call."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


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
    return activation_reason(act) or (None if rectified else f"{_a(type(bn))} has an activation where none may be")


def rectified_norm_reason(step: Any) -> str | None:
    """Why a module is not to be taken for a BatchNorm and a ReLU behind it."""
    if RECTIFYING.of(type(step)) is None:
        return NORMS.reason(step) or f"{_a(type(step))} has no activation in it"
    return norm_reason(step, rectified=True) or activation_reason(getattr(step, "act", None))


def activation_reason(activation: nn.Module | None) -> str | None:
    """Why an activation must be called."""
    return ACTIVATIONS.reason(activation)


def pool_reason(pool: Any) -> str | None:
    """Why a pool must be called: a fused one is a square max-pool without dilation, ceil mode and indices."""
    if reason := POOLS.reason(pool):
        return reason
    if isinstance(pool, SameMaxPool2d):
        return None
    square = all(isinstance(size, int) or size[0] == size[1] for size in (pool.kernel_size, pool.stride, pool.padding))
    if not square or pool.dilation not in (1, (1, 1)) or pool.ceil_mode or pool.return_indices:
        return f"a pool is {pool}"
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
    return f"{_a(type(module))} stands in the block"


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
        return f"{_a(type(module))}'s {name} is {_a(type(value))}"
    if "parametrizations" in module._modules and name in module._modules["parametrizations"]:
        return None
    return f"{_a(type(module))}'s {name} is not a parameter of its own"


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
