"""Bytes that the kernels of torch.compile's default backend, Inductor, move on an H100, without an H100.

Dynamo, AOTAutograd and the partitioner trace and divide the training step on the CPU; the two graphs are then put on a
fake CUDA device of an H100's properties, and Inductor lowers and schedules them as it would there, with the vendor's
convolutions on channels-last tensors. It stops before it generates code. The bytes are Inductor's own count of each
scheduled kernel: every buffer that the kernel reads and writes, once. Only ``convolution_backward``, one node there, is
counted as the two kernels that it is, each of which reads the result's gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import torch
import torch._dynamo.device_interface as device_interface
import torch._functorch.config as functorch_config
import torch._inductor.compile_fx as compile_fx
import torch._inductor.config as inductor_config
from torch import Tensor, nn
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.scheduler import BaseSchedulerNode
from torch._subclasses.fake_tensor import FakeTensor

from bench.count_eager import CallTraffic

_CUDA = torch.device("cuda", 0)
_H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
    L2_cache_size=50 << 20,
)


class _Scheduled(Exception):  # noqa: N818
    """Inductor has got as far as it needs to."""


def traffic(module: nn.Module, x: Tensor, dtype: torch.dtype) -> list[CallTraffic]:
    """Traffic of the compiled forward and backward of a channels-last module under autocast; nothing is computed."""
    found: list[CallTraffic] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        return compile_fx.compile_fx(graph, inputs, inner_compile=schedule)

    def schedule(graph: torch.fx.GraphModule, inputs: list[Tensor], **options: Any) -> Any:
        with _fake_h100(found):
            try:
                compile_fx.compile_fx_inner(_on_cuda(graph), _inputs(graph), **options)
            except Exception as error:
                if not any(isinstance(e, _Scheduled) for e in (error, error.__cause__, error.__context__)):
                    raise
        return _stop

    torch._dynamo.reset()
    with (
        inductor_config.patch(force_disable_caches=True),
        functorch_config.patch(force_non_lazy_backward_lowering=True),
        torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
    ):
        try:
            torch.compile(module, backend=backend, fullgraph=True)(x)
        except _Scheduled:
            pass
        finally:
            torch._dynamo.reset()
    return found


def _stop(*_: Any) -> None:
    raise _Scheduled


def _on_cuda(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    for node in graph.graph.nodes:
        node.meta.pop("tensor_meta", None)
        if "val" in node.meta:
            node.meta["val"] = torch.utils._pytree.tree_map(_tensor_on_cuda, node.meta["val"])
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": _CUDA}
    return graph


def _tensor_on_cuda(value: Any) -> Any:
    if not isinstance(value, FakeTensor):
        return value
    with value.fake_mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=_CUDA)


def _inputs(graph: torch.fx.GraphModule) -> list[Any]:
    return [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]


@contextmanager
def _fake_h100(found: list[CallTraffic]) -> Iterator[None]:
    def compile_to_module(graph: GraphLowering) -> None:
        graph.init_wrapper_code()
        graph._update_scheduler()
        for node in graph.scheduler.nodes:
            found.extend(_kernels(node))
        raise _Scheduled

    properties = DeviceProperties(
        "cuda",
        0,
        _H100.multi_processor_count,
        90,
        _H100.major,
        _H100.regs_per_multiprocessor,
        _H100.max_threads_per_multi_processor,
        _H100.max_threads_per_block,
        _H100.warp_size,
    )
    interface = device_interface.CudaInterface
    available = torch.cuda.is_available()  # which may count the devices

    def answer(value: Any) -> Callable:
        return lambda *_, **__: value

    with ExitStack() as patches:
        for owner, name, value in (
            (torch.cuda, "get_device_properties", answer(_H100)),
            (torch.cuda, "get_device_capability", answer((9, 0))),
            (torch.cuda, "current_device", answer(0)),
            (torch.cuda, "device_count", answer(1)),
            (torch.cuda, "is_available", answer(available)),
            (interface, "get_device_properties", staticmethod(answer(_H100))),
            (interface, "get_compute_capability", staticmethod(answer(90))),
            (interface, "is_available", staticmethod(answer(True))),
            (interface.Worker, "get_device_properties", staticmethod(answer(_H100))),
            (DeviceProperties, "create", answer(properties)),
            (compile_fx, "_check_triton_bf16_support", answer(None)),
            (torch._C, "_select_conv_backend", answer(torch._C._ConvBackend.Cudnn)),  # type: ignore[attr-defined]
            (torch._C, "_conv_determine_backend_memory_format", answer(torch.channels_last)),
            (torch._inductor.scheduler, "has_triton", answer(True)),
            (torch._subclasses.fake_tensor, "init_gpu_context", answer(None)),
            (GraphLowering, "compile_to_module", compile_to_module),
        ):
            patches.enter_context(mock.patch.object(owner, name, value))
        yield


def _kernels(node: BaseSchedulerNode) -> list[CallTraffic]:
    loaded, stored = node.get_read_buffer_sizes(), node.get_write_buffer_sizes()
    name = getattr(node.node, "python_kernel_name", None) or node.get_name()
    if not loaded + stored:
        return []
    if "convolution_backward" in name:
        gradient = cast(Any, node.node).inputs[0]
        loaded += gradient.get_layout().storage_size() * gradient.get_dtype().itemsize
    return [CallTraffic(name, int(loaded), int(stored))]
