"""The networks whose training steps are predicted, and what they launch."""

from __future__ import annotations

import torch

from bench.counted import NETWORKS
from bench.launches import Launch, recorded
from bench.sass import SHARED_LIMIT
from fastres.kernels.resources import shared_memory_of
from fastres.measure import Workload
from fastres.models.fused import create_fused_model

# Those that issues and pages compare; any other that `bench.traffic` has counted can be predicted too.
SHOWN = ("resnet50", "resnet50 CIFAR", "resnet18 CIFAR", "notebook", "speed94", "speed95", "speed96")
# The same in every network, and left out of what PyTorch's and Inductor's steps are counted by.
SHARED_BY_ALL = ("global_avg_pool",)


def step(network: str, rank: int = 0, arch: int = 90, batch: int | None = None) -> list[Launch]:
    """`step_of` a network.

    Args:
        network: key of `NETWORKS`.
        batch: images; None: the network's own.
    """
    name, size, options, own = NETWORKS[network]
    return step_of(Workload(name, batch or own, size, options), rank, arch)


def step_of(workload: Workload, rank: int = 0, arch: int = 90) -> list[Launch]:
    """Triton's launches in a training step in bf16 of the stem and the blocks, in order.

    Args:
        workload: of a network of the registry.
        rank: of the configurations that the launchers offer, the first at 0.
        arch: compute capability of the GPU, as 90, by which they choose.
    """
    size = workload.image_size
    model = create_fused_model(workload.model, recompute=False, **workload.options)
    images = torch.empty(workload.batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    with shared_memory_of(SHARED_LIMIT[arch], arch), recorded(rank) as launches:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images)
        logits.float().sum().backward()
    return [one for one in launches if not one.specialisation.kernel.startswith(SHARED_BY_ALL)]
