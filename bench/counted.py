"""The networks whose bytes are counted (`bench.traffic`) and whose steps are predicted (`bench.machine`)."""

from __future__ import annotations

from typing import Any, NamedTuple

from fastres.models import model_names


class Counted(NamedTuple):
    """A network as it is counted."""

    model: str  # name for `create_model`
    size: int  # pixels of the images' sides
    options: dict[str, Any] = {}
    batch: int = 256  # images


# All of the registry, some of them twice.
NETWORKS: dict[str, Counted] = {
    **{name: Counted(name, 32) for name in model_names()},
    **{f"resnet{depth}": Counted(f"resnet{depth}", 224, {"num_classes": 1000}) for depth in (18, 34, 50, 101, 152)},
    "resnet50 CIFAR": Counted("resnet50", 32, {"stem": "cifar"}),
    "resnet18 CIFAR": Counted("resnet18", 32, {"stem": "cifar"}),
    "notebook": Counted("notebook", 96),
    **{name: Counted(name, 32, batch=500) for name in ("speed94", "speed95", "speed96")},  # as their presets have it
}
