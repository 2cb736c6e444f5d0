"""What of a network is fused, what is not, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from fastres.nn.blocks import FusedBlock
from fastres.nn.classes import Fused
from fastres.nn.networks import AVERAGE, BIASED, BLOCKS, CALL, NORM, STEM, opened_containers, parts_of
from fastres.nn.roles import CONTAINERS, CONVS, NORMS
from fastres.nn.structure import entry_of, is_block, is_network, structure_of, tell
from fastres.nn.wrapped import calls_its_class

LISTED = 3  # of what was left, in one line
PASSING = ("has hooks", "is active")  # ends of reasons that may pass without another module or class


@dataclass
class Report:
    """What is fused in a model, or would be.

    Attributes:
        name: of the model's class.
        blocks, fused_blocks: how many residual blocks there are, and of them how many are fused.
        stems, heads: how many first layers (convolution, BatchNorm, ReLU, pool), and global average pools or last
            BatchNorms with ReLU, are fused.
        left: by the name of each module that is not, or not wholly, fused: why.
    """

    name: str
    blocks: int = 0
    fused_blocks: int = 0
    stems: int = 0
    heads: int = 0
    left: dict[str, str] = field(default_factory=dict)

    @property
    def found(self) -> bool:
        """Whether anything is fused."""
        return bool(self.fused_blocks or self.stems or self.heads)

    def __str__(self) -> str:
        """One line."""
        parts = [f"{self.fused_blocks} of {self.blocks} blocks"]
        parts += [
            f"{count} {name}{'s' * (count > 1)}"
            for count, name in ((self.stems, "stem"), (self.heads, "head"))
            if count
        ]
        text = f"{self.name}: fused {', '.join(parts)}"
        return f"{text}; left {self.reasons()}" if self.left else text

    def reasons(self) -> str:
        """What was left, equal reasons together, the first few."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            by_reason.setdefault(reason, []).append(name)
        texts = []
        for reason, names in list(by_reason.items())[:LISTED]:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            texts.append(f"{names[0]}{more} ({reason})")
        if len(by_reason) > LISTED:
            texts.append(f"{len(by_reason) - LISTED} other reasons, see fastres.nn.report(model)")
        return ", ".join(texts)


def report(model: nn.Module) -> Report:
    """What of a model is fused now: forwards decide by the same rules.

    Args:
        model: as `fastres.nn.fuse` left it, or changed since.
    """
    return survey(model, planned=False)


def survey(model: nn.Module, planned: bool) -> Report:
    """See `report`.

    Args:
        planned: count what `fuse` would fuse as fused.
    """
    found = Report(type(model).__name__)
    inside: set[nn.Module] = set()  # parts of known blocks, and containers that a network opens
    for name, module in model.named_modules():
        name = name or type(module).__name__
        cls = type(module)
        if is_block(cls):
            inside.update(module.modules())
            found.blocks += 1
            reason = _block_left(module, planned)
            if reason is None:
                found.fused_blocks += 1
            else:
                found.left[name] = reason
        elif is_network(cls) and module not in inside:
            inside.update(_add_network(found, name, module, planned))
        elif module not in inside and _owns_layers(module):
            found.left[name] = f"{cls.__name__} has no adapter: fastres.nn.register_block tells what it is made of"
    return found


def _block_left(block: nn.Module, planned: bool) -> str | None:
    if not planned and not isinstance(block, FusedBlock):
        return structure_of(block)[1] or "it is not fused yet"
    return structure_of(block, _is_reached(block))[1]


def _is_reached(module: nn.Module) -> bool:
    """Whether it has a fused forward that runs though one of the instance, such as accelerate's, is in front of it."""
    return isinstance(module, Fused) and calls_its_class(module)


def _add_network(found: Report, name: str, network: nn.Module, planned: bool) -> list[nn.Module]:
    """Count its stem and head; returns the containers in it that are counted with it."""
    container = CONTAINERS.of(type(network)) is not None
    if container and not (isinstance(network, Fused) or planned and is_worthwhile(network)):
        return []
    steps, reason = tell(network, _is_reached(network))
    if reason is None and not (planned or isinstance(network, Fused)):
        reason = "it is not fused yet"
    if reason is not None:
        found.left[name] = reason
        return []
    parts = parts_of(steps, is_fusable)
    found.stems += any(part.kind in (STEM, BIASED) for part in parts)
    found.heads += any(part.kind in (AVERAGE, NORM) for part in parts)
    reasons = [part.reason for part in parts if part.reason is not None]
    if reasons:
        found.left[name] = "; ".join(dict.fromkeys(reasons))
    fused = {step for part in parts if part.kind == STEM for step in part.steps}
    holders = [module for module in network.modules() if not fused.isdisjoint(module.children())]
    return [*opened_containers(steps), *holders]


def is_fusable(module: nn.Module) -> bool:
    """Whether a module is, or can be, a fused block, now or when what hinders it is over: hooks, an active dropout."""
    if not is_block(type(module)):
        return False
    reason = _block_left(module, True)
    return reason is None or reason.endswith(PASSING)


def is_worthwhile(container: nn.Module) -> bool:
    """Whether an ``nn.Sequential`` has a stem or head, or blocks in a row, for its fused forward."""
    steps, reason = tell(container)
    if reason is not None:
        return False
    for part in parts_of(steps, is_fusable):
        if part.kind not in (CALL, BLOCKS, AVERAGE) or part.kind == BLOCKS and len(part.steps) > 1:
            return True
    return False


def _owns_layers(module: nn.Module) -> bool:
    """Whether convolutions and BatchNorms are its direct children."""
    kinds = [type(child) for child in module.children()]
    return any(map(CONVS.of, kinds)) and any(map(NORMS.of, kinds)) and entry_of(type(module)) is None


def fusable_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The modules to which `fuse` gives a fused class: blocks first."""
    modules = list(model.modules())
    blocks = [module for module in modules if is_fusable(module)]
    yield from blocks
    inside = {part for module in modules if is_block(type(module)) for part in module.modules()}
    for module in modules:
        if not is_network(type(module)) or module in inside or tell(module)[1] is not None:
            continue
        if CONTAINERS.of(type(module)) is None or is_worthwhile(module):
            yield module
