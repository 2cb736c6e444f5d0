"""A network as layers one behind the other: the stem, the blocks and the head, for what a run does to some of them."""

from __future__ import annotations

import difflib

from torch import nn

from fastres.errors import FastresError

_CONTAINERS = (nn.Sequential, nn.ModuleList)
STEM, BACKBONE = "stem", "backbone"  # names for --freeze beside those of modules


def layers(model: nn.Module) -> list[list[str]]:
    """The modules of each layer, by name: what lies before the first block, each block, the last linear layer.

    A normalisation belongs to the convolution before it.
    """
    found: list[list[str]] = []

    def visit(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            if isinstance(child, _CONTAINERS):
                visit(child, f"{prefix}{name}.")
            elif any(isinstance(part, (nn.Conv2d, nn.Linear)) for part in child.modules()) or not found:
                found.append([prefix + name])
            else:
                found[-1].append(prefix + name)

    visit(model, "")
    return found


def depths(model: nn.Module) -> dict[int, int]:
    """How many layers lie behind the layer of each parameter, by the parameter's id: 0 of the head."""
    last, found = len(layers(model)) - 1, {}
    for number, names in enumerate(layers(model)):
        for name in names:
            for parameter in model.get_submodule(name).parameters():
                found[id(parameter)] = last - number
    return found


def head_name(model: nn.Module) -> str:
    """The module that makes the logits.

    Raises:
        FastresError: where it is no linear layer.
    """
    name = layers(model)[-1][0]
    if not isinstance(model.get_submodule(name), nn.Linear):
        raise FastresError(f"{type(model).__name__} ends with {name!r}, which is no linear layer: take another --model")
    return name


class Frozen:
    """Parts of a network that training leaves alone: their parameters get no gradient, their BatchNorms keep their
    statistics and use them.

    Args:
        parts: names of modules, `STEM` or `BACKBONE`, with commas between; None: nothing.

    Raises:
        FastresError: for a name that the network does not have, or where nothing is left to be trained.
    """

    def __init__(self, model: nn.Module, parts: str | None):
        self.modules = [] if parts is None else _modules(model, parts)
        for module in self.modules:
            module.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise FastresError(
                f"--freeze {parts} leaves nothing to be trained: leave the head, {head_name(model)}, out"
            )

    def apply(self) -> None:
        """To be called whenever the network was put into training mode."""
        for module in self.modules:
            module.eval()


def _modules(model: nn.Module, parts: str) -> list[nn.Module]:
    groups, known = layers(model), dict(model.named_modules())
    named = {STEM: groups[0], BACKBONE: [name for group in groups[:-1] for name in group]}
    found = []
    for part in (part.strip() for part in parts.split(",")):
        names = named.get(part, [part])
        if not part or names[0] not in known:
            choices = [
                STEM,
                BACKBONE,
                *(name for name, child in model.named_children() if any(True for _ in child.parameters())),
            ]
            near = difflib.get_close_matches(part, [*choices, *known], n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise FastresError(f"--freeze {part!r} is no part of the network: {hint}choose from {', '.join(choices)}")
        found += [known[name] for name in names]
    return found
