"""The parts of a step: stages of residual blocks as each variant, and single operations by implementation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.blocks import Part, fused, parts_of
from bench.layer_calls import Call, bottleneck_calls
from bench.workloads import CIFAR, IMAGENET, Setting
from fastres.measure import Timing, interleaved
from fastres.measure.variants import VARIANTS, best_library
from fastres.ops import implementation
from fastres.train import machine

# network, image size, options, batch on a GPU and on a CPU
NETWORKS: dict[str, tuple[str, int, dict[str, Any], int, int]] = {
    "resnet50 224": ("resnet50", 224, IMAGENET, 256, 2),
    "notebook": ("notebook", 96, {}, 64, 16),
    "resnet18 CIFAR": ("resnet18", 32, CIFAR, 512, 16),
    "resnet20": ("resnet20", 32, {}, 512, 16),
    "preact_resnet164": ("preact_resnet164", 32, {}, 128, 16),
}
BLOCK_VARIANTS = ("eager NCHW", "eager", "compile", "compile max-autotune", "vendor", "fused Triton", "fused")
SLOW = ("compile max-autotune",)  # compiles for minutes: for the first network only
# image sides and widths of the identity bottlenecks of ResNet-50
BOTTLENECKS = ((56, 64), (28, 128), (14, 256), (7, 512))


def cases(setting: Setting) -> dict[str, Callable[[], dict[str, Any]]]:
    """See `bench.stages`."""
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for size, width in setting.pick(BOTTLENECKS, BOTTLENECKS[1:3], ((4, 16),)):
        found[f"operations, bottleneck {size}x{size}x{4 * width}"] = partial(measure_calls, setting, size, width)
    networks = setting.pick(tuple(NETWORKS), ("resnet50 224", "notebook"), ("resnet20",))
    for name in networks:
        model, image, options, gpu_batch, cpu_batch = NETWORKS[name]
        image, batch = setting.pick((image, gpu_batch), (image, cpu_batch), (8, 2))
        parts = parts_of(model, image, **options)
        for part in parts[1:2] if setting.dry else parts:
            slow = name == networks[0]
            found[f"{name}, block {part.name}"] = partial(measure_part, setting, name, part.first(), batch, slow)
            if part.blocks > 1 and not setting.dry:
                found[f"{name}, stage {part.name}"] = partial(measure_part, setting, name, part, batch, False)
    return found


def measure_part(setting: Setting, network: str, part: Part, batch: int, slow: bool) -> dict[str, Any]:
    """Forward and backward of blocks as each variant, in turn; with those that compile for minutes if ``slow``."""
    torch._dynamo.reset()
    variants = [p for p in BLOCK_VARIANTS if p in setting.supported() and (slow or p not in SLOW)]
    steps = {variant: PartStep(part, variant, batch, setting) for variant in variants}
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        times = interleaved(steps, setting.device, setting.warmup, setting.rounds)
    return {
        "network": network,
        "part": part.name,
        "blocks": part.blocks,
        "input": list(part.shape),
        "batch": batch,
        "flops": part_flops(part, batch),
        "variants": {variant: as_figures(time) for variant, time in times.items()},
    }


class PartStep:
    """Forward and backward of blocks; random input and gradient."""

    def __init__(self, part: Part, variant: str, batch: int, setting: Setting):
        how, device = VARIANTS[variant], setting.device
        layout = torch.channels_last if how.channels_last else torch.contiguous_format
        module = fused(part) if how.fused else copy.deepcopy(part.modules)
        module = module.to(device).to(memory_format=layout)  # type: ignore[call-overload]
        self.parameters = list(module.parameters())
        self.run: Callable[[Tensor], Tensor] | nn.Module = module
        if how.compile is not None:
            self.run = torch.compile(module, mode=how.compile, dynamic=False)
        needed = part.images(1, torch.float32).requires_grad
        dtype = setting.dtype if needed else torch.float32  # of an activation, or of the images
        x = torch.randn(batch, *part.shape, device=device, dtype=dtype).to(memory_format=layout)
        self.x = x.requires_grad_(needed)
        self.implementation, self.setting = how.implementation, setting
        self.gradient: Tensor | None = None

    def __call__(self) -> None:
        """One forward and backward."""
        with implementation(self.implementation), best_library():
            with machine.autocast(self.setting.device, self.setting.dtype):
                out = self.run(self.x)
            if self.gradient is None:
                self.gradient = torch.randn_like(out)
            out.backward(self.gradient)
        self.x.grad = None
        for parameter in self.parameters:
            parameter.grad = None


def part_flops(part: Part, batch: int) -> int:
    """Floating-point operations of the convolutions, forward and backward."""
    modules = copy.deepcopy(part.modules).to("meta")
    needed = part.images(1, torch.float32).requires_grad
    x = torch.empty(2, *part.shape, device="meta", requires_grad=needed)
    with FlopCounterMode(display=False) as counter:
        modules(x).sum().backward()
    return counter.get_total_flops() * batch // 2


def measure_calls(setting: Setting, size: int, width: int) -> dict[str, Any]:
    """Every operation of an identity bottleneck's step by each implementation, in turn."""
    batch = setting.pick(256, 8, 2)
    found = {}
    for call in bottleneck_calls(batch, size, width, setting.device, setting.dtype):
        with best_library():
            times = interleaved(call.candidates, setting.device, setting.warmup, setting.rounds)
        found[call.name] = {
            "flops": call.flops,
            "bytes": call.bytes,
            "candidates": {name: _with_rates(time, call) for name, time in times.items()},
        }
    return {"batch": batch, "size": size, "width": width, "calls": found}


def _with_rates(time: Timing | Exception, call: Call) -> dict[str, Any]:
    figures = as_figures(time)
    if isinstance(time, Timing):
        figures |= {
            "gb_per_second": call.bytes / time.median / 1e9,
            "tflops": call.flops / time.median / 1e12,
        }
    return figures


def as_figures(time: Timing | Exception) -> dict[str, Any]:
    """The timing, or the error, as plain values."""
    if isinstance(time, Timing):
        return {"seconds": time._asdict()}
    return {"error": f"{type(time).__name__}: {time}"[:300]}
