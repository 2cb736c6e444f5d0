"""The ways to run one training step that are measured against each other, each in its best setting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Variant:
    """One way to run a training step; dtype, data, loss and optimizer are the same in all."""

    summary: str
    fused: bool = False
    implementation: str = "auto"  # of the fused operations: see `fastres.ops.implementation`
    recompute: bool = False  # what fused blocks keep for backward: see `fastres.nn.fuse`
    channels_last: bool = True
    compile: str | None = None  # mode of torch.compile
    cuda_graph: bool = False  # the whole step captured once and replayed
    programmatic: bool | None = None  # see `fastres.kernels.dependent`; None: as the environment says
    gpu_only: bool = False


VARIANTS: dict[str, Variant] = {
    "eager NCHW": Variant("eager PyTorch, NCHW", channels_last=False),
    "eager": Variant("eager PyTorch, channels-last"),
    "compile": Variant("torch.compile, default mode", compile="default"),
    "compile max-autotune": Variant(
        "torch.compile, every kernel autotuned", compile="max-autotune-no-cudagraphs", gpu_only=True
    ),
    "compile graphs": Variant("torch.compile with CUDA graphs", compile="reduce-overhead", gpu_only=True),
    "vendor": Variant(
        "fused schedule on the vendor's convolutions and Triton's passes",
        fused=True,
        implementation="vendor",
        gpu_only=True,
    ),
    "fused Triton": Variant(
        "fused schedule on Triton kernels alone, untimed choice",
        fused=True,
        implementation="triton",
        gpu_only=True,
    ),
    "fused": Variant("fused, implementation chosen by timing on a GPU, compiled C++ passes on a CPU", fused=True),
    "fused recompute": Variant(
        "fused, the last convolution of each block recomputed in backward", fused=True, recompute=True
    ),
    "fused compile": Variant("fused, under torch.compile", fused=True, compile="default"),
    "fused graph": Variant("fused, the step replayed as one CUDA graph", fused=True, cuda_graph=True, gpu_only=True),
    "fused graph PDL": Variant(
        "the same graph, a kernel's programs starting before the kernel before has ended",
        fused=True,
        cuda_graph=True,
        programmatic=True,
        gpu_only=True,
    ),
}


def supported(device: torch.device) -> list[str]:
    """Names of the variants that run on a device."""
    return [name for name, variant in VARIANTS.items() if device.type == "cuda" or not variant.gpu_only]


@contextmanager
def best_library() -> Iterator[None]:
    """cuDNN takes the fastest of its algorithms, timed at the first call of a shape, as `fastres train` does.

    PyTorch's default is a guess from the shape: neither eager nor compiled nor fused steps are at their best with it.
    """
    cudnn = torch.backends.cudnn
    before, cudnn.benchmark = cudnn.benchmark, True
    try:
        yield
    finally:
        cudnn.benchmark = before
