"""One training step of a network as one of the variants: forward, loss, backward, SGD."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastres.errors import FastresError
from fastres.kernels.dependent import programmatic
from fastres.measure.timing import synchronize
from fastres.measure.variants import VARIANTS, best_library
from fastres.models import create_model
from fastres.nn import fuse
from fastres.ops import implementation
from fastres.train import graph, machine
from fastres.train.optimizer import Optimizer, make_optimizer


@dataclass(frozen=True)
class Workload:
    """A network and the batch that it is trained on.

    Args:
        model: a name of `fastres.models`, or ``package.module:callable``, called with ``options`` for an ``nn.Module``
            from images [N, 3, H, W] to logits.
        batch, image_size: images a step and their height and width in pixels.
        options: of the model.
    """

    model: str
    batch: int
    image_size: int
    options: dict[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """The eager network in training mode, the same weights every time.

        Raises:
            FastresError: for a model that there is not.
        """
        torch.manual_seed(0)
        if ":" not in self.model:
            return create_model(self.model, **self.options).train()
        module, _, name = self.model.partition(":")
        try:
            model = getattr(importlib.import_module(module), name)(**self.options)
        except (ImportError, AttributeError, TypeError) as error:
            raise FastresError(f"model {self.model!r} cannot be made: {error}") from error
        if not isinstance(model, nn.Module):
            raise FastresError(f"model {self.model!r} makes a {type(model).__name__}, not a torch.nn.Module")
        return model.train()

    def inputs(self, device: torch.device, channels_last: bool = True) -> tuple[Tensor, Tensor]:
        """Images fp32 [N, 3, H, W] and labels int64 [N] below 10, the same every time."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(self.batch, 3, self.image_size, self.image_size, generator=generator)
        labels = torch.randint(10, (self.batch,), generator=generator)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return images.to(device, memory_format=layout), labels.to(device)

    def flops(self) -> int:
        """Floating-point operations of the products of a step, from the shapes; a multiply-add is two."""
        images = torch.empty(2, 3, self.image_size, self.image_size, device="meta")
        with FlopCounterMode(display=False) as counter:
            logits = self.build().to("meta")(images)
            F.cross_entropy(logits, torch.zeros(2, dtype=torch.long, device="meta")).backward()
        return counter.get_total_flops() * self.batch // 2


def _optimizer(model: nn.Module, ours: bool) -> torch.optim.Optimizer | Optimizer:
    """SGD: `fastres.train`'s, or PyTorch's at its fastest, whose weight decay is coupled."""
    options: dict[str, Any] = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    if ours:
        return make_optimizer(model, 1e-3, **options, scaled=False)
    return torch.optim.SGD(model.parameters(), 1e-3, **options, fused=True)


class Step:
    """A training step to be called again and again.

    Args:
        workload: what is trained.
        variant: a name of `VARIANTS`.
        device, dtype: where, and the autocast dtype; float32 means off.
        backend: of torch.compile.

    Raises:
        FastresError: for a model that there is not, or whose blocks no fused form exists for.
    """

    def __init__(
        self,
        workload: Workload,
        variant: str,
        device: torch.device,
        dtype: torch.dtype,
        backend: str = "inductor",
    ):
        self.variant, self.device, self.dtype = VARIANTS[variant], device, dtype
        layout = torch.channels_last if self.variant.channels_last else torch.contiguous_format
        self.model = workload.build()
        if self.variant.fused:
            try:
                fuse(self.model, self.variant.recompute)
            except ValueError as error:
                raise FastresError(str(error)) from error
        self.model.to(device, memory_format=layout)  # type: ignore[call-overload]
        self.network: Callable[[Tensor], Tensor] = self.model
        if self.variant.compile is not None:
            self.network = torch.compile(self.model, mode=self.variant.compile, backend=backend, dynamic=False)
        self.optimizer = _optimizer(self.model, self.variant.fused)
        self.images, self.labels = workload.inputs(device, self.variant.channels_last)
        self._run = self._before_recording if self.variant.cuda_graph else self._step
        self._taken = 0
        self._stream: torch.cuda.Stream | None = None

    def __call__(self) -> Tensor:
        """One step; its loss, still on the device."""
        kernels = implementation(self.variant.implementation), programmatic(self.variant.programmatic)
        with machine.on_device(self.device), kernels[0], kernels[1], best_library():
            return self._run()

    def settle(self, before_rest: Callable[[], None] = lambda: None) -> Tensor:
        """Take the steps that are unlike all to come: kernels are compiled and chosen, graphs recorded.

        Args:
            before_rest: called after the first of them.

        Returns:
            The loss of the first step, the same for every variant but for rounding.
        """
        first = self().clone()
        before_rest()
        if self.variant.cuda_graph or self.variant.compile == "reduce-overhead":
            for _ in range(graph.WARMUP):
                self()
        return first

    def _step(self) -> Tensor:
        if self.variant.compile == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        with machine.autocast(self.device, self.dtype):
            logits = self.network(self.images)
        loss = F.cross_entropy(logits.float(), self.labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _before_recording(self) -> Tensor:
        """A step without the graph, `graph.WARMUP` times; then it is recorded, and every step is a replay."""
        if self._taken < graph.WARMUP:
            self._taken += 1
            self._stream = self._stream or graph.side_stream(self.images.device)
            with graph.aside(self._stream):
                return self._step()
        assert self._stream is not None
        replay, loss = graph.record(self._step, self._stream)

        def replayed() -> Tensor:
            replay()
            return loss

        self._run = replayed
        return replayed()


def peak_memory(
    workload: Workload,
    variant: str,
    device: torch.device,
    dtype: torch.dtype,
    backend: str = "inductor",
    steps: int = 3,
) -> dict[str, float]:
    """Memory of some training steps in MiB, before and at the highest: allocated on a GPU, resident on a CPU.

    On a GPU the first step does not count, in which implementations are tried. On a CPU call it in a process of its
    own, as the highest figure there is that of the process.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    step = Step(workload, variant, device, dtype, backend)
    synchronize(device)
    idle = _memory(device)
    loss = step.settle(partial(_forget_peak, device))
    for _ in range(steps - 1):
        loss = step()
    synchronize(device)
    if not torch.isfinite(loss):
        raise FloatingPointError(f"the loss of {variant!r} is {loss.item()}")
    return {"idle_mib": idle, "peak_mib": _memory(device)}


def _forget_peak(device: torch.device) -> None:
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _memory(device: torch.device) -> float:
    if device.type == "cuda":
        return machine.peak_memory_mib(device)
    with open("/proc/self/status") as lines:  # getrusage would count the parent's memory at the fork
        kib = next(line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(kib) / 1024
