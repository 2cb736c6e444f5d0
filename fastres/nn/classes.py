"""The fused class of an eager one: made when it is needed, its subclass, and taken off again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class Fused(nn.Module):
    """Base of the fused forms of registered classes; `_eager` is the class that each was made of."""

    _eager: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Its class is made when it is needed, so pickles hold the eager one."""
        reduced: Any = super().__reduce_ex__(protocol)
        if "_eager" not in vars(type(self)) or reduced[0].__name__ != "__newobj__":
            return reduced
        return _new, (type(self)._eager,), *reduced[2:]

    def __prepare_scriptable__(self) -> nn.Module:
        """Raises RuntimeError: torch.jit.script compiles eager modules only."""
        raise RuntimeError("torch.jit.script cannot compile a fused module: fastres.nn.unfuse(model) first")


def _new(eager: type[nn.Module]) -> nn.Module:
    cls = fused_class(eager)
    return cls.__new__(cls)


_fused: dict[tuple[type, type], type[nn.Module]] = {}
_FORMS: list[tuple[Callable[[type], bool], type[Fused]]] = []


def form(applies: Callable[[type], bool]) -> Callable[[type[Fused]], type[Fused]]:
    """Decorator: the class has the fused forward of the eager classes to which it applies."""

    def register(cls: type[Fused]) -> type[Fused]:
        _FORMS.append((applies, cls))
        return cls

    return register


def fused_class(eager: type[nn.Module]) -> Any:
    """The fused class of an eager one: its subclass, of the same name, made once.

    Raises:
        TypeError: for a class without a fused form.
    """
    mixin = next((mixin for applies, mixin in _FORMS if applies(eager)), None)
    if mixin is None:
        raise TypeError(f"{eager.__qualname__} has no fused form: fastres.nn.register_block gives it one")
    key = mixin, eager
    if key not in _fused:
        names = {
            "__module__": mixin.__module__,
            "__doc__": f"`{eager.__module__}.{eager.__qualname__}`, fused.",
            "_eager": eager,
        }
        metaclass: Any = type(eager)
        _fused[key] = metaclass(eager.__name__, (mixin, eager), names)
    return _fused[key]


def unfused_class(cls: type[nn.Module]) -> type[nn.Module]:
    """A class without the fused forward: the eager class, also below classes that others put on top."""
    if not issubclass(cls, Fused):
        return cls
    if "_eager" in vars(cls):
        return vars(cls)["_eager"]
    bases = tuple(unfused_class(base) for base in cls.__bases__)
    names = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    metaclass: Any = type(cls)
    return metaclass(cls.__name__, bases, names)


def become_fused(module: nn.Module) -> None:
    """Give a module the fused class."""
    if not isinstance(module, Fused):
        module.__class__ = fused_class(type(module))
