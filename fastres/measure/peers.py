"""The ways to run one training step that are measured against each other, each in its best setting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from unittest import mock

import torch

from fastres.ops import aten, select
from fastres.ops.library import LibraryConvolutions


@dataclass(frozen=True)
class Peer:
    """One way to run a training step; dtype, data, loss and optimizer are the same in all."""

    summary: str
    fused: bool = False
    implementation: str = "auto"  # of the fused operations: see `forced`
    keep: str = "all"  # what fused blocks keep for backward: see `fastres.nn.fuse`
    channels_last: bool = True
    compile: str | None = None  # mode of torch.compile
    cuda_graph: bool = False  # the whole step captured once and replayed
    gpu_only: bool = False


PEERS: dict[str, Peer] = {
    "eager NCHW": Peer("eager PyTorch, NCHW", channels_last=False),
    "eager": Peer("eager PyTorch, channels-last"),
    "compile": Peer("torch.compile, default mode", compile="default"),
    "compile max-autotune": Peer(
        "torch.compile, every kernel autotuned", compile="max-autotune-no-cudagraphs", gpu_only=True
    ),
    "compile graphs": Peer("torch.compile with CUDA graphs", compile="reduce-overhead", gpu_only=True),
    "library": Peer(
        "fused schedule on the library's convolutions and Triton's passes",
        fused=True,
        implementation="library",
        gpu_only=True,
    ),
    "fused Triton": Peer(
        "fused schedule on Triton kernels alone, untimed choice",
        fused=True,
        implementation="triton",
        gpu_only=True,
    ),
    "fused": Peer("fused, implementation chosen by timing on a GPU, compiled C++ passes on a CPU", fused=True),
    "fused fewer": Peer("fused, the last convolution of each block recomputed in backward", fused=True, keep="fewer"),
    "fused compile": Peer("fused, under torch.compile", fused=True, compile="default"),
    "fused graph": Peer("fused, the step replayed as one CUDA graph", fused=True, cuda_graph=True, gpu_only=True),
}


def supported(device: torch.device) -> list[str]:
    """Names of the peers that run on a device."""
    return [name for name, peer in PEERS.items() if device.type == "cuda" or not peer.gpu_only]


@contextmanager
def forced(implementation: str) -> Iterator[None]:
    """Fused operations run one implementation: see `select.implementation`, or ``"library"``.

    ``"library"`` is the candidate that the Triton convolutions compete with, in every place where it can stand; on a
    GPU only.
    """
    if implementation != "library":
        with select.implementation(implementation):
            yield
        return
    with select.implementation("auto"), mock.patch.object(select, "_timed_primitives", _library_primitives):
        yield


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


@cache
def _library_primitives(device: torch.device) -> select.Primitives:
    triton = select._triton()
    library = LibraryConvolutions(triton.moments, triton.bn_add_relu, triton.bn_backward_apply, aten.bn_sums)
    return select.Primitives({"library": library, "triton": triton}, device=device)
