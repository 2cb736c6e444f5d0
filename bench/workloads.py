"""What the campaign trains: networks and batches for a GPU, for a CPU and for a dry run."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from fastres.measure import VARIANTS, Workload, supported
from fastres.reference.resnet import BasicBlock

T = TypeVar("T")
IMAGE = 3  # channels of an image, where a kernel does not tell
IMAGENET = {"num_classes": 1000, "stem": "imagenet"}
CIFAR = {"stem": "cifar"}
GPU = {
    "resnet50 224": Workload("resnet50", 256, 224, IMAGENET),
    "resnet50 CIFAR": Workload("resnet50", 512, 32, CIFAR),
    "notebook": Workload("notebook", 64, 96),
    "resnet18 CIFAR": Workload("resnet18", 512, 32, CIFAR),
    "resnet110": Workload("resnet110", 128, 32),
    "preact_resnet1001": Workload("preact_resnet1001", 64, 32),
}
# What only the preset ``speed`` of `fastres train`, and stage `parts`, run.
SPEED = Workload("speed", 256, 32)
PARTS = {
    "resnet20": Workload("resnet20", 512, 32),
    "preact_resnet164": Workload("preact_resnet164", 128, 32),
}
CPU = {
    "notebook": Workload("notebook", 64, 96),
    "resnet18 CIFAR": Workload("resnet18", 16, 32, CIFAR),
    "resnet50 224": Workload("resnet50", 4, 224, IMAGENET),
    "resnet110": Workload("resnet110", 32, 32),
    "resnet50 CIFAR": Workload("resnet50", 16, 32, CIFAR),
    "preact_resnet1001": Workload("preact_resnet1001", 2, 32),
}
DRY = {"resnet smallest": Workload("bench.workloads:smallest", 4, 8)}
# torch.compile unrolls a network, so that the deepest takes it longer than a stage has.
TOO_DEEP_TO_COMPILE = {"preact_resnet1001"}
TOO_DEEP_TO_AUTOTUNE = {"resnet110", *TOO_DEEP_TO_COMPILE}


def smallest() -> nn.Module:
    """The least network that has a fused block, quick to compile."""
    block = BasicBlock(8, 8)
    stem, head = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Linear(8, 10)
    return nn.Sequential(stem, block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


@dataclass(frozen=True)
class Setting:
    """Where a stage of the campaign runs, and how much it may do."""

    device: torch.device
    dtype: torch.dtype
    dry: bool
    data: str
    out: Path
    seconds: float  # that the stage has
    begun: float = field(default_factory=time.monotonic)

    def pick(self, gpu: T, cpu: T, dry: T) -> T:
        """One of the three, by the machine."""
        return dry if self.dry else gpu if self.device.type == "cuda" else cpu

    @property
    def left(self) -> float:
        """Seconds until the stage is killed."""
        return self.begun + self.seconds - time.monotonic()

    @property
    def rounds(self) -> int:
        """Timed samples of a call."""
        return self.pick(20, 3, 2)

    @property
    def warmup(self) -> int:
        """Calls that are not timed."""
        return self.pick(5, 1, 1)

    def workloads(self) -> dict[str, Workload]:
        """All networks."""
        return self.pick(GPU, CPU, DRY)

    def sweeps(self) -> dict[str, Workload]:
        """Networks at several batches."""
        batches = self.pick((128, 256, 1024, 2048), (), (2,))  # on a CPU `bench.growth` has the batches
        names = self.pick(("resnet18 CIFAR", "resnet50 CIFAR"), (), tuple(DRY))
        base = self.workloads()
        return {f"{name}, batch {batch}": replace(base[name], batch=batch) for name in names for batch in batches}

    def supported(self) -> list[str]:
        """Names of all variants that run: in a dry run on stand-ins for what only a GPU has."""
        return list(VARIANTS) if self.dry else supported(self.device)

    def variants(self, name: str) -> list[str]:
        """The variants that a workload is run as."""
        skipped = set()
        if name in TOO_DEEP_TO_COMPILE or (name in TOO_DEEP_TO_AUTOTUNE and self.device.type == "cpu"):
            skipped |= {variant for variant, how in VARIANTS.items() if how.compile}
        if name in TOO_DEEP_TO_AUTOTUNE:
            skipped.add("compile max-autotune")
        return [variant for variant in self.supported() if variant not in skipped]
