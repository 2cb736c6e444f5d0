"""What was decided of modules, kept for as long as nothing of them changes.

What a fused forward does depends on all that its modules are: classes, hooks, settings, parameters. To look at each
takes Python longer than a small layer takes to compute. So everything that they hold is noted with the decision, and
compared object by object, in a few loops of C, before the decision is used again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import chain
from operator import is_
from types import BuiltinFunctionType, FunctionType
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastres.nn.roles import generation

Decision = TypeVar("Decision")

MOST_MISSES = 8  # decisions in a row that were of no use, as something changes at every forward: then none is kept
MOST_KEYS = 16  # a module
_CONTAINERS = (dict, list, set)
# Of nn.Module: what no call of a module depends on where it has no hooks.
_IDLE = frozenset(nn.Module().__dict__) - {"training", "_parameters", "_buffers", "_modules", "_forward_hooks",
                                           "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"}  # fmt: skip
_CONSTANTS = (bool, int, float, str, bytes, type(None), type, BuiltinFunctionType, torch.dtype, torch.device,
              torch.layout, torch.memory_format, *((dist.ProcessGroup,) if dist.is_available() else ()))  # fmt: skip


class Unnotable(Exception):
    """Something that modules hold may change without being another object."""


class Snapshot:
    """All that modules, those in them and their classes hold, by identity.

    Args:
        roots: none of them is kept alive.

    Raises:
        Unnotable: where comparing objects would not tell a change.

    Attributes:
        tensors: the identities of the parameters and buffers.
    """

    def __init__(self, roots: Sequence[nn.Module]):
        below = [[m for m in root.modules() if m is not root] for root in roots]
        if not {id(m) for m in chain(*below)}.isdisjoint(map(id, roots)):
            raise Unnotable("one of the modules is in another one")
        self._below = [m for members in below for m in members]
        modules = [*roots, *self._below]
        self._types = list(map(type, modules))
        classes = dict.fromkeys(base for cls in self._types for base in cls.__mro__[:-1])
        held = [container for m in modules for container in _containers(vars(m))]
        self._empty = [container for container in held if not container]
        self._views = [
            *(vars(m).values() for m in self._below),
            *(_values(container) for container in held if container),
            *(vars(cls).values() for cls in classes),
        ]
        views = self._all_views(roots)
        self._sizes = list(map(len, views))
        self._objects = list(chain.from_iterable(views))
        found = {id(value): value for container in held for value in _values(container) if isinstance(value, Tensor)}
        self.tensors = frozenset(found)
        self._tensors = [tensor for tensor in found.values() if tensor.dim()]  # no counters
        self._forms = list(map(_form, self._tensors))

    def holds(self, roots: Sequence[nn.Module]) -> bool:
        """Whether nothing is other than it was; tensors may have other elements."""
        views = self._all_views(roots)
        return (
            not any(self._empty)
            and list(map(type, [*roots, *self._below])) == self._types
            and list(map(len, views)) == self._sizes
            and all(map(is_, chain.from_iterable(views), self._objects))
            and list(map(_form, self._tensors)) == self._forms
        )

    def _all_views(self, roots: Sequence[nn.Module]) -> list[Any]:
        return [*(vars(root).values() for root in roots), *self._views]


def _containers(attributes: dict[str, Any]) -> list[Any]:
    """The dicts, lists and sets among a module's attributes that matter.

    Raises:
        Unnotable: where a module, or one of these, holds what may change without being another object.
    """
    matter = [value for name, value in attributes.items() if name not in _IDLE]
    found = [value for value in matter if isinstance(value, _CONTAINERS)]
    others = [value for value in matter if not isinstance(value, _CONTAINERS)]
    submodules = attributes["_modules"]
    for value in chain(others, *(_values(one) for one in found if one is not submodules)):
        if not (isinstance(value, Tensor) or _is_constant(value)):
            raise Unnotable(f"a module holds a {type(value).__name__}")
    return found


def _values(container: Any) -> Any:
    return container.values() if isinstance(container, dict) else container


def _is_constant(value: Any) -> bool:
    """Whether it is the same for as long as it is the same object, and keeps no module alive."""
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    if isinstance(value, FunctionType):
        return value.__closure__ is None
    return isinstance(value, _CONSTANTS)


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.__class__, tensor.dtype, tensor.device, tensor.shape, tensor.is_contiguous()


class _Kept(Generic[Decision]):
    """A decision with the snapshot that is to hold; how often in a row one did not."""

    def __init__(self) -> None:
        self.last: tuple[Snapshot, Decision] | None = None
        self.misses = 0


_kept: WeakKeyDictionary[nn.Module, dict[Hashable, _Kept]] = WeakKeyDictionary()


def while_unchanged(
    roots: Sequence[nn.Module], key: Hashable, decide: Callable[[Sequence[nn.Module]], Decision]
) -> tuple[Decision, frozenset[int]]:
    """What ``decide`` says of modules, from before where nothing of them changed since.

    Args:
        roots: modules; the decision depends on these, on those in them and on ``key`` alone.
        decide: of the roots; its result must not hold one.

    Returns:
        The decision, and the identities of all parameters and buffers, where none of them can become another without
        a new decision; or else of none.
    """
    if torch.compiler.is_compiling():
        return decide(roots), frozenset()
    entries = _kept.setdefault(roots[0], {})
    whole = (key, len(roots), roots[0].training, generation(), *_ranks())
    kept = entries.get(whole)
    if kept is None:
        if len(entries) >= MOST_KEYS:
            entries.clear()
        kept = entries[whole] = _Kept()
    last = kept.last
    if last is not None and last[0].holds(roots):
        kept.misses = 0
        return last[1], last[0].tensors
    decision = decide(roots)
    kept.last = None
    kept.misses += 1
    if kept.misses > MOST_MISSES:
        return decision, frozenset()
    try:
        snapshot = Snapshot(roots)
    except Unnotable:
        kept.misses = MOST_MISSES
        return decision, frozenset()
    kept.last = snapshot, decision
    return decision, snapshot.tensors


def _ranks() -> tuple[Hashable, ...]:
    """Who takes statistics together, as far as no module says it."""
    return (dist.group.WORLD,) if dist.is_available() and dist.is_initialized() else ()
