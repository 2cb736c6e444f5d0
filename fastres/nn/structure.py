"""What blocks and networks are made of, told by an adapter a class.

An adapter is a function from a module to its structure; it is asked anew at every forward, so that a module that was
exchanged or configured otherwise is seen. Subclasses that change nothing in the forward share their base's adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastres.nn.bypass import (
    absent_reason,
    act_of,
    activation_reason,
    first_reason,
    unsupported,
)
from fastres.nn.roles import CONTAINERS, HOLDERS, IDENTITIES, Known, declared_anew, is_original


class Block(NamedTuple):
    """A residual block: all that its forward does.

    ``relu(bn_n(conv_n(... relu(bn_1(conv_1(x))))) + shortcut(x))``, or with ``preactivation``
    ``conv_n(relu(bn_n(... conv_1(relu(bn_1(x)))))) + shortcut``. With GELU where its activations are.
    """

    layers: Sequence[tuple[Any, Any]]  # each convolution with the BatchNorm behind it, or in front of it
    activations: Sequence[nn.Module] = ()  # the modules of its activation, ReLU or GELU, that the forward calls
    # None: x itself, or a module: nn.Sequential(convolution, BatchNorm) joins the operation; such a pair at the end of
    # a longer nn.Sequential is one of its own, those in front of it (a pool, say) and all other modules are called; or
    # a pair that another module holds. With preactivation a convolution of the rectified x.
    shortcut: nn.Module | tuple[nn.Module, nn.Module] | None = None
    residual: bool = True  # whether it has a shortcut at all
    relu: bool = True  # whether its activation ends it
    preactivation: bool = False
    absent: Sequence[nn.Module | None] = ()  # what the forward calls besides, which must do nothing for now
    opened: Sequence[nn.Module] = ()  # modules in it that hold those above and whose own forward calls them
    act: str = "auto"  # its activation, "relu" or "gelu"; "auto": that of its modules


class Stages(NamedTuple):
    """A step of a network: blocks that its forward calls one after the other, see `run_blocks`."""

    blocks: Sequence[nn.Module]
    checkpoint_every: int = 0


Step = nn.Module | Stages | Callable[[Tensor], Tensor]


class Entry(NamedTuple):
    """What is registered for a class."""

    known: Known
    adapter: Callable[[Any], Any]
    is_block: bool  # else a network


_entries: dict[type, Entry] = {}
_named: dict[
    tuple[str, str], tuple[Callable[[Any], Any], bool]
] = {}  # by module and name of classes that may be missing
_found: dict[type, Entry | None] = {}


def register_block(cls: type[nn.Module], adapter: Callable[[Any], Block]) -> None:
    """Let `fuse` and `fold` know blocks of a class of one's own, and of subclasses that keep its forward.

    Args:
        cls: takes [N, C, H, W] as the only argument of its forward.
        adapter: from a block to the `Block` that says what its forward does. Every module that the forward calls must
            be in it: those that are not are no longer called, and hooks on them do not run.
    """
    _register(cls, adapter, True)


def register_network(cls: type[nn.Module], adapter: Callable[[Any], Sequence[Step]]) -> None:
    """Let `fuse` and `fold` know networks of a class of one's own, so that their stem, chains of blocks and head fuse.

    Args:
        cls: takes [N, C, H, W] as the only argument of its forward.
        adapter: from a network to all that its forward does: modules and functions in the order in which they are
            called, each with the result of the one before. ReLU must be a module. A function may keep what it is given,
            and the last one return what was kept.
    """
    _register(cls, adapter, False)


def _register(cls: type[nn.Module], adapter: Callable[[Any], Any], is_block: bool) -> None:
    _entries[cls] = Entry(Known(cls), adapter, is_block)
    _found.clear()
    declared_anew()


def register_named_block(module: str, name: str, adapter: Callable[[Any], Block]) -> None:
    """`register_block` of a class by its module and name: a library that is imported later, or never."""
    _named[module, name] = adapter, True
    _found.clear()
    declared_anew()


def register_named_network(module: str, name: str, adapter: Callable[[Any], Sequence[Step]]) -> None:
    """`register_network` of a class by its module and name."""
    _named[module, name] = adapter, False
    _found.clear()
    declared_anew()


def registered_classes() -> list[type]:
    """Those with an adapter."""
    return list(_entries)


def entry_of(cls: type) -> Entry | None:
    """What is registered for a class or its nearest base."""
    if cls not in _found:
        found = [_entry_of(base) for base in cls.__mro__]  # torch.compile of 2.11 traces no := in a generator
        _found[cls] = next((entry for entry in found if entry is not None), None)
    return _found[cls]


def _entry_of(cls: type) -> Entry | None:
    """What is registered for this very class; one that is known by name is so only with its own module's forward."""
    named = _named.get((cls.__module__, cls.__qualname__))
    if cls not in _entries and named is not None and is_original(cls):
        _entries[cls] = Entry(Known(cls), *named)
    return _entries.get(cls)


def is_block(cls: type) -> bool:
    """Whether the class, or its nearest base that is registered, is registered as a block."""
    entry = entry_of(cls)
    return entry is not None and entry.is_block


def is_network(cls: type) -> bool:
    """Whether the class, or its nearest base that is registered, is registered as a network."""
    entry = entry_of(cls)
    return entry is not None and not entry.is_block


def tell(module: nn.Module, running: bool = False) -> tuple[Any, str | None]:
    """The structure of a module of a registered class; or None and why its adapter does not hold for it.

    Args:
        running: see `Known.changed`.
    """
    entry = entry_of(type(module))
    if entry is None:
        return None, "no adapter is registered"
    if reason := entry.known.changed(module, running):
        return None, reason
    try:
        return entry.adapter(module), None
    except AttributeError as error:  # a part was taken away
        return None, str(error)


def structure_of(block: nn.Module, running: bool = False) -> tuple[Block | None, str | None]:
    """What a block is made of for now; or None and why it must run its eager forward.

    Args:
        running: see `Known.changed`.
    """
    structure, reason = tell(block, running)
    if reason is None:
        if structure.act == "auto":
            structure = structure._replace(act=act_of(next(iter(structure.activations), None)))
        reason = structure_reason(structure)
    return (structure, None) if reason is None else (None, reason)


def structure_reason(block: Block) -> str | None:
    """Why a fused operation cannot stand for the modules of a block."""
    for activation in block.activations:
        if reason := activation_reason(activation, block.act):
            return reason
    rectified = block.preactivation or block.relu and not block.residual
    if reason := layers_reason(block.layers, rectified, block.act):
        return reason
    for module in block.absent:
        if reason := absent_reason(module):
            return reason
    for container in block.opened:
        if reason := HOLDERS.reason(container):
            return reason
    if isinstance(block.shortcut, tuple):
        return "a pre-activation block's shortcut is a pair" if block.preactivation else unsupported(*block.shortcut)
    if block.preactivation and block.residual and block.shortcut is not None:
        return unsupported(block.shortcut)
    return None


def layers_reason(layers: Sequence[tuple[nn.Module, nn.Module]], rectified: bool, act: str = "relu") -> str | None:
    """Why a fused operation cannot stand for convolutions and BatchNorms with activations between them.

    Args:
        rectified: whether one follows the last BatchNorm too.
    """
    last, relu = len(layers) - 1, act == "relu"  # which may be in the BatchNorm
    return first_reason(
        unsupported(*pair, rectified=relu and (rectified or index < last)) for index, pair in enumerate(layers)
    )


def projection_of(shortcut: Any) -> tuple[nn.Module, nn.Module] | None:
    """Convolution and BatchNorm of a shortcut that joins the fused operation; None: it is called, or a part of it."""
    if isinstance(shortcut, tuple):
        return shortcut
    found = projection_behind(shortcut)
    return None if found is None or found[0] else found[1]


def projection_behind(shortcut: Any) -> tuple[list[nn.Module], tuple[nn.Module, nn.Module]] | None:
    """Modules that a shortcut calls first, and the convolution and BatchNorm at its end; None: it has no such end.

    As in ResNet-D (He et al. 2019, "Bag of tricks"), whose shortcut is an average pool and an unstrided projection.
    """
    if shortcut is None or CONTAINERS.of(type(shortcut)) is None or CONTAINERS.reason(shortcut):
        return None
    modules = [m for m in shortcut if IDENTITIES.of(type(m)) is None or IDENTITIES.reason(m)]
    if len(modules) < 2 or unsupported(*modules[-2:]):
        return None
    return modules[:-2], (modules[-2], modules[-1])
