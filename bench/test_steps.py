"""Training steps of whole networks as every peer that this machine runs."""

import pytest
import torch

from bench.workloads import CPU, GPU
from fastres.measure import Step, supported

HAS_GPU = torch.cuda.is_available()
PEERS = supported(torch.device("cuda" if HAS_GPU else "cpu"))
NAMES = tuple(GPU) if HAS_GPU else ("notebook", "resnet18 CIFAR")


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("name", NAMES)
def test_step(name, peer, setting, measured):
    if peer not in setting.peers(name):
        pytest.skip(f"{peer} takes too long to compile {name}")
    workload = (GPU if HAS_GPU else CPU)[name]
    torch._dynamo.reset()
    step = Step(workload, peer, setting.device, setting.dtype)
    measured(step, batch=workload.batch, flops=workload.flops())
