"""Training steps of whole networks as every variant that this machine runs."""

import pytest
import torch

from bench.workloads import CPU, GPU
from fastres.measure import Step, supported

HAS_GPU = torch.cuda.is_available()
VARIANTS = supported(torch.device("cuda" if HAS_GPU else "cpu"))
NAMES = tuple(GPU) if HAS_GPU else ("notebook", "resnet18 CIFAR")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", NAMES)
def test_step(name, variant, setting, measured):
    if variant not in setting.variants(name):
        pytest.skip(f"{variant} takes too long to compile {name}")
    workload = (GPU if HAS_GPU else CPU)[name]
    torch._dynamo.reset()
    step = Step(workload, variant, setting.device, setting.dtype)
    measured(step, batch=workload.batch, flops=workload.flops())
