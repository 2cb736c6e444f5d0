"""The networks whose training steps are predicted, and what they launch."""

from __future__ import annotations

from typing import Any

import torch

from bench.launches import Launch, recorded
from bench.sass import SHARED_LIMIT
from fastres.kernels.resources import shared_memory_of
from fastres.models.fused import create_fused_model

BATCH = 256
# As `bench.traffic` names and counts them: (name for `create_model`, size of the images, options)
NETWORKS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "resnet50": ("resnet50", 224, {"num_classes": 1000}),
    "resnet50 CIFAR": ("resnet50", 32, {"stem": "cifar"}),
    "resnet18 CIFAR": ("resnet18", 32, {"stem": "cifar"}),
    "notebook": ("notebook", 96, {}),
}
# The same in every network, and left out of what PyTorch's and Inductor's steps are counted by.
_SHARED_BY_ALL = ("global_avg_pool",)


def step(network: str, rank: int = 0, arch: int = 90, batch: int = BATCH) -> list[Launch]:
    """Triton's launches in a training step in bf16 of the stem and the blocks, in order.

    Args:
        network: key of `NETWORKS`.
        rank: of the configurations that the launchers offer, the first at 0.
        arch: compute capability of the GPU, as 90, by which they choose.
    """
    name, size, options = NETWORKS[network]
    model = create_fused_model(name, recompute=False, **options)
    images = torch.empty(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    with shared_memory_of(SHARED_LIMIT[arch], arch), recorded(rank) as launches:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images)
        logits.float().sum().backward()
    return [one for one in launches if not one.specialisation.kernel.startswith(_SHARED_BY_ALL)]
