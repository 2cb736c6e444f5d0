"""What adapters share."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from fastres.nn.structure import Step


def numbered_layers(block: nn.Module, norm: str = "bn") -> list[tuple[nn.Module, nn.Module]]:
    """``conv1`` with ``bn1`` (or another name), and so on, as far as the block has them."""
    return [(getattr(block, f"conv{i}"), getattr(block, f"{norm}{i}")) for i in (1, 2, 3) if hasattr(block, f"conv{i}")]


def keeping_steps(
    modules: nn.ModuleDict, names: Mapping[str, Any], value: Callable[[Any], Any], result: Callable[[OrderedDict], Any]
) -> list[Step]:
    """Of a container that calls its modules in order and returns what some of them give.

    Args:
        modules: the container.
        names: of the modules whose results are kept, in the container and in what it returns.
        value: what is kept of a result.
        result: what is returned, of all that was kept.
    """
    kept: OrderedDict[Any, Any] = OrderedDict()  # of one forward: adapters are asked anew at each

    def keep(name: Any, x: Any) -> Any:
        kept[name] = value(x)
        return x

    steps: list[Step] = []
    for name, module in modules.items():
        steps.append(module)
        if name in names:
            steps.append(partial(keep, names[name]))
    return [*steps, lambda x: result(kept)]
