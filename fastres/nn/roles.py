"""Which classes the fused operations stand for, in which role, and what each of them declares.

A class is known with the methods that its forward calls, so that another forward, on a subclass or an instance, is
noticed. A class that does more than its role says, such as a convolution that pads by the size of its input, declares
it here: the fused layers ask what is declared, never which class it is. Adapters declare, see `fastres.nn.adapters`.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d, StochasticDepth

from fastres.kernels.geometry import LARGEST_POOL
from fastres.ops import Identity
from fastres.ops.layers import Pad

_CALLERS = frozenset(("_call_impl", "_wrapped_call_impl"))


class Window(NamedTuple):
    """A pool's sizes over one input."""

    kernel: int
    stride: int
    pad: Pad


class Known:
    """A class whose forward the fused operations can do, as it was when this was made.

    Args:
        cls: the class.
        declared: what it does besides its role; the role says what that may be.
    """

    def __init__(self, cls: type[nn.Module], declared: Any = None):
        self.cls = cls
        self.declared = declared
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
        return f"{with_article(cls)} has an instance's {' and '.join(changed)}" if changed else None

    def reason(self, module: nn.Module) -> str | None:
        """Why the module must be called."""
        if has_hooks(module):
            return f"{with_article(type(module))} has hooks"
        return self.changed(module)


def with_article(cls: type) -> str:
    """The class's name as a sentence has it."""
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


_changes = 0


def generation() -> int:
    """How often it was declared anew what classes do; what was decided of modules before may be otherwise now."""
    return _changes


def declared_anew() -> None:
    """Count it."""
    global _changes
    _changes += 1


class Role:
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
        declared_anew()

    def add(self, cls: type[nn.Module], declared: Any = None) -> None:
        """Accept a class, and keep what it declares."""
        self._known[cls] = Known(cls, declared)
        self._found.clear()
        declared_anew()

    def declared(self, module: nn.Module) -> Any:
        """What the module's class, or its nearest base that is known, declares; None: nothing."""
        known = self.of(type(module))
        return None if known is None else known.declared

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


CONVS = Role("nn.Conv2d", nn.Conv2d)
BIASED_CONVS = Role("a convolution with bias that fuses with the ReLU behind it")
NORMS = Role("nn.BatchNorm2d", nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)
RECTIFYING = Role("a BatchNorm with an activation in it")  # `drop` and `act`, which its forward calls
ACTIVATIONS = Role("nn.ReLU", nn.ReLU)
GELUS = Role("nn.GELU", nn.GELU)
POOLS = Role("nn.MaxPool2d", nn.MaxPool2d)
AVERAGES = Role("nn.AdaptiveAvgPool2d", nn.AdaptiveAvgPool2d)
CONTAINERS = Role("nn.Sequential", nn.Sequential)
HOLDERS = Role("a module that only calls those that it holds", nn.Sequential)
IDENTITIES = Role("nn.Identity", nn.Identity)
SHORTCUTS = Role("a shortcut without parameters")
DROPOUTS = Role("a dropout", nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout, StochasticDepth)

Padding = Callable[[Sequence[int], Sequence[int], int], Pad]


def declare_convolution(cls: type[nn.Conv2d], pad: Padding | None = None, bias: bool = False) -> None:
    """Let the fused operations know a convolution with a forward of its own, by what it computes.

    Args:
        cls: has no bias but with ``bias``.
        pad: its padding, of the input's height and width, the kernel's, and the stride; None: as ``padding`` says.
        bias: it has a bias, and fuses with the ReLU behind it.
    """
    CONVS.add(cls, pad)
    if bias:
        BIASED_CONVS.add(cls)


def declare_pool(cls: type[nn.Module], window: Callable[[Any, tuple[int, int]], Window | None]) -> None:
    """Let the fused operations know a max-pool.

    Args:
        cls: a max-pool whose padding never wins.
        window: of the module and the height and width of its input; None: an input of that size is not pooled.
    """
    POOLS.add(cls, window)


def declare_shortcut(cls: type[nn.Module], identity: Callable[[Any], Identity]) -> None:
    """Let the fused operations know a shortcut without parameters that takes pixels and adds channels of zeros."""
    SHORTCUTS.add(cls, identity)


def declared_padding(conv: nn.Module) -> Padding | None:
    """The padding that a convolution's class declares; None: as its ``padding`` says."""
    return CONVS.declared(conv)


def window_of(pool: Any, hw: tuple[int, int]) -> Window | None:
    """A max-pool's window over an input of height and width ``hw``; None: it is to be called."""
    window = (POOLS.declared(pool) or max_pool_window)(pool, hw)
    return None if window is None or window.kernel > LARGEST_POOL else window


def max_pool_window(pool: Any, hw: tuple[int, int]) -> Window:
    """Of ``nn.MaxPool2d``, the same for every size."""
    sizes = pool.kernel_size, pool.stride, pool.padding
    kernel, stride, padding = (size if isinstance(size, int) else size[0] for size in sizes)
    return Window(kernel, stride, (padding,) * 4)


def identity_of(shortcut: Any) -> Identity | None:
    """What a shortcut without parameters does, if the fused operation can do it; None as shortcut is x itself."""
    if shortcut is None:
        return Identity()
    if SHORTCUTS.of(type(shortcut)) is None or SHORTCUTS.reason(shortcut) is not None:
        return None
    return SHORTCUTS.declared(shortcut)(shortcut)


def has_hooks(module: nn.Module) -> bool:
    """Whether something waits for the module's own call."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
