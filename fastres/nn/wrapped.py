"""Whether a forward that was put on an instance still leads to its class's, as wrappers of other libraries do."""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

MOST = 2000  # objects that are looked at; wrappers are some ten deep at most
_NO_CODE = (nn.Module, Tensor, type, types.ModuleType, str, bytes, int, float, type(None))


def calls_its_class(module: nn.Module) -> bool:
    """Whether the instance's own forward can reach that of its class; True where it has none.

    What the wrapper's code can reach is followed: its closures, defaults, globals, bound arguments, and what it names
    of the module. So are torch.autocast's and torch.compile's wrappers of a forward, accelerate's, and a function that
    calls the former ``module.forward``. What a decorator only notes (``__wrapped__``) is not taken for a call.
    """
    if "forward" not in module.__dict__:
        return True
    target = type(module).forward
    waiting = deque([module.__dict__["forward"]])
    seen: dict[int, Any] = {}
    while waiting and len(seen) < MOST:
        item = waiting.popleft()
        if item is target:
            return True
        if id(item) not in seen and not isinstance(item, _NO_CODE):
            seen[id(item)] = item  # kept, so that no other object gets its id
            waiting.extend(_reached(item, module))
    return False


def _reached(item: Any, module: nn.Module) -> Iterator[Any]:
    if isinstance(item, types.MethodType):
        if item.__self__ is module or not isinstance(item.__self__, nn.Module):
            yield from (item.__func__, item.__self__)
    elif isinstance(item, types.FunctionType):
        yield from _of_function(item, module)
    elif isinstance(item, functools.partial):
        yield from (item.func, *item.args, *item.keywords.values())
    elif isinstance(item, dict):
        yield from item.values()
    elif isinstance(item, (list, tuple, set)):
        yield from item
    else:
        yield type(item).__dict__.get("__call__")
        yield from (value for name, value in getattr(item, "__dict__", {}).items() if name != "__wrapped__")


def _of_function(function: types.FunctionType, module: nn.Module) -> Iterator[Any]:
    names = set(_names(function.__code__))
    if "forward" in names and not names.isdisjoint(("type", "__class__")):  # type(module).forward(module, x)
        yield type(module).forward
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # nothing is in it yet
            pass
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    for name in names:
        yield module.__dict__.get(name)
        yield function.__globals__.get(name)


def _names(code: types.CodeType) -> Iterator[str]:
    """What the code names, with the functions that it defines."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
