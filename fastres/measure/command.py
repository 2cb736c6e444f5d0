"""``fastres bench``: a training step of one network as each of the variants, timed in turn."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from fastres.errors import FastresError
from fastres.measure.step import Step, Workload
from fastres.measure.timing import Timing, interleaved
from fastres.measure.variants import VARIANTS, supported
from fastres.models.registry import accepted_options
from fastres.train import machine


def bench(args: argparse.Namespace) -> int:
    """Time a training step of a network: eager, compiled, fused."""
    device = machine.pick_device(args.device)
    dtype = machine.pick_dtype(args.precision, device)
    variants = args.variants or supported(device)
    for name in variants:
        if name not in VARIANTS:
            raise FastresError(f"unknown variant {name!r}: choose from {', '.join(map(repr, VARIANTS))}")
        if name not in supported(device):
            raise FastresError(f"variant {name!r} needs a GPU: leave it out, or choose from {supported(device)}")
    if args.batch_size < 2:
        raise FastresError("--batch-size 1 leaves BatchNorm no statistics: make it at least 2")
    machine.treat_freed_memory(device, False)
    workload = Workload(args.model, args.batch_size, args.image_size, stem_option(args.model, args.image_size))
    found = measure_steps(workload, variants, device, dtype, rounds=args.rounds)
    print(
        f"{args.model}, training, batch {args.batch_size}, {args.image_size}x{args.image_size}, "
        f"{str(dtype).removeprefix('torch.')}, {device_name(device)}"
    )
    print(table(found["variants"]))
    if args.json:
        args.json.write_text(json.dumps({"device": device_name(device), **found}, indent=1) + "\n")
    return 0 if all("error" not in figures for figures in found["variants"].values()) else 1


def stem_option(model: str, image_size: int) -> dict[str, Any]:
    """The stem that `fastres train` takes by default.

    Raises:
        FastresError: for an unknown model.
    """
    if ":" in model or "stem" not in accepted_options(model):
        return {}
    return {"stem": "cifar" if image_size <= 64 else "imagenet"}


def device_name(device: torch.device) -> str:
    """The GPU's name, or that it is a CPU and with how many threads."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def measure_steps(
    workload: Workload,
    variants: list[str],
    device: torch.device,
    dtype: torch.dtype,
    rounds: int = 10,
    warmup: int = 3,
    backend: str = "inductor",
) -> dict[str, Any]:
    """Time the training step of each variant, see `interleaved`; plain values for a table or JSON.

    Under ``variants`` by name: seconds a step (median, quartiles), images/s, TFLOP/s and the first step's loss, or the
    error. torch.compile does not fall back to eager unnoticed: a recompilation too many is an error.

    Raises:
        FastresError: for a model that there is not.
    """
    with machine.on_device(device):
        return _measure_steps(workload, variants, device, dtype, rounds, warmup, backend)


def _measure_steps(
    workload: Workload,
    variants: list[str],
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    warmup: int,
    backend: str,
) -> dict[str, Any]:
    flops = workload.flops()
    torch._dynamo.reset()
    steps: dict[str, Step] = {}
    losses: dict[str, float] = {}
    failed: dict[str, Exception] = {}
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        for name in variants:
            try:
                steps[name] = Step(workload, name, device, dtype, backend)
                losses[name] = steps[name].settle().item()
            except FastresError:
                raise
            except Exception as error:
                failed[name] = error
        times = interleaved({name: steps[name] for name in losses}, device, warmup, rounds)
    figures = {}
    for name in variants:
        time = times.get(name, failed.get(name))
        if isinstance(time, Timing):
            rates = {"images_per_second": workload.batch / time.median, "tflops": flops / time.median / 1e12}
            figures[name] = {"seconds": time._asdict(), **rates, "first_loss": losses[name]}
        else:
            figures[name] = {"error": f"{type(time).__name__}: {time}"[:400]}
    return {
        "model": workload.model,
        "batch": workload.batch,
        "image_size": workload.image_size,
        "options": workload.options,
        "dtype": str(dtype).removeprefix("torch."),
        "flops": flops,
        "variants": figures,
    }


def table(figures: dict[str, dict[str, Any]]) -> str:
    """A line a variant, with its time as a multiple of the first one's."""
    lines = [f"{'variant':<22}{'ms a step':>11}{'quartiles':>22}{'images/s':>11}{'TFLOP/s':>10}{'speed':>8}"]
    first = next((f["seconds"]["median"] for f in figures.values() if "seconds" in f), None)
    for name, one in figures.items():
        if "error" in one:
            lines.append(f"{name:<22}{one['error']}")
            continue
        median, low, high = (1e3 * one["seconds"][part] for part in ("median", "low", "high"))
        lines.append(
            f"{name:<22}{median:>11.3f}{f'{low:.3f} to {high:.3f}':>22}{one['images_per_second']:>11.0f}"
            f"{one['tflops']:>10.3f}{first / (median / 1e3):>7.2f}x"
        )
    return "\n".join(lines)
