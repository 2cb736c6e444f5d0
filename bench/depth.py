"""What shortcuts do for depth: gradient norms, layer by layer, of plain networks beside their residual twins.

    python -m bench.depth --depths 56 110 --steps 30 --out bench/results/depth.json

Both twins are the CIFAR networks of He et al. 2015 with the same weights and the same batches of the built-in set; the
norm is that of each convolution's weight gradient, before training and after some steps. The picture has the
result file's name with the suffix ``.png``. Beside it: time and memory of one training step of the pre-activation
network of 1001 layers, with all activations stored and with activation checkpointing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.record import RESULTS, write_results
from fastres.atomic import atomic_write
from fastres.data import Augment, Batches
from fastres.data.dataset import channel_statistics
from fastres.data.synthetic import synthetic_split
from fastres.reference.cifar import CifarResNet
from fastres.reference.preact import PreActResNet
from fastres.train import machine
from fastres.train.optimizer import make_optimizer

KINDS = {"plain": False, "residual": True}


def gradient_norms(model: nn.Module, images: Tensor, labels: Tensor) -> list[float]:
    """L2 norm of the weight gradient of each convolution, from the image to the logits, for one batch."""
    model.train().zero_grad()
    F.cross_entropy(model(images), labels).backward()
    kernels = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    norms = [kernel.grad.norm().item() for kernel in kernels if kernel.grad is not None]
    model.zero_grad()
    return norms


def measure_twin(depth: int, residual: bool, args: argparse.Namespace) -> dict[str, Any]:
    """Gradient norms before and after ``args.steps`` steps, and the losses of those steps."""
    device = machine.pick_device("auto")
    split = synthetic_split(args.batch * (args.steps + 1), seed=args.seed)
    batches = Batches(split, args.batch, *channel_statistics(split.images), Augment(), seed=args.seed, device=device)
    stream = batches.epoch(0)
    probe = next(stream)
    torch.manual_seed(args.seed)
    model = CifarResNet(depth, residual=residual).to(device)
    optimizer = make_optimizer(model, args.lr, momentum=0.9, nesterov=True, weight_decay=5e-4, scaled=False)
    before, losses = gradient_norms(model, *probe), []
    for images, labels in stream:
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {
        "depth": depth,
        "kind": "residual" if residual else "plain",
        "before": before,
        "after": gradient_norms(model, *probe),
        "losses": losses,
    }


def measure_step(depth: int, checkpoint_every: int, batch: int, repeats: int, threads: int) -> dict[str, Any]:
    """Time of a training step of the pre-activation network on 32x32 images, and the memory that it adds."""
    torch.set_num_threads(threads)
    device = machine.pick_device("auto")
    torch.manual_seed(0)
    model = PreActResNet(depth, checkpoint_every=checkpoint_every).to(device)
    optimizer = make_optimizer(model, 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, scaled=False)
    images, labels = torch.randn(batch, 3, 32, 32, device=device), torch.arange(batch, device=device) % 10
    idle, wall, cpu = peak_memory_mib(device), [], []
    for _ in range(repeats):
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        wall.append(time.perf_counter() - wall_start)
        cpu.append(time.process_time() - cpu_start)
    return {
        "depth": depth,
        "checkpoint_every": checkpoint_every,
        "batch": batch,
        "seconds": wall,
        "cpu_seconds": cpu,
        "idle_mib": idle,
        "peak_mib": peak_memory_mib(device),
    }


def peak_memory_mib(device: torch.device) -> float:
    """Highest memory so far: allocated on a GPU, resident on a CPU since the process began its program."""
    if device.type == "cuda":
        return machine.peak_memory_mib(device)
    with open("/proc/self/status") as lines:  # getrusage would count the parent's memory at the fork
        kib = next(line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(kib) / 1024


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result, computed in a fresh process: its peak memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def plot(twins: list[dict[str, Any]], path: Path, steps: int) -> None:
    """Gradient norms against the layer on a log scale: one panel before training, one after; one line a network."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    depths = sorted({twin["depth"] for twin in twins})
    panels = figure.subplots(1, 2, sharey=True)
    for axes, moment, title in zip(panels, ("before", "after"), ("at initialisation", f"after {steps} steps")):
        for twin in twins:
            axes.semilogy(
                range(1, len(twin[moment]) + 1),
                twin[moment],
                color="C3" if twin["kind"] == "plain" else "C0",
                linestyle=("-", "--", ":", "-.")[depths.index(twin["depth"]) % 4],
                label=f"{twin['kind']}, {twin['depth']} layers",
            )
        axes.set(title=title, xlabel="layer, from the image to the logits")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("norm of the weight gradient")
    panels[0].legend()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depths", type=int, nargs="+", default=[56, 110], help="layers of the twins, 6n + 2")
    parser.add_argument("--batch", type=int, default=64, help="images a step of the twins")
    parser.add_argument("--steps", type=int, default=30, help="training steps between the two measurements")
    parser.add_argument("--lr", type=float, default=0.02, help="learning rate of those steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--deep", type=int, default=1001, help="layers of the pre-activation network, 9n + 2")
    parser.add_argument("--deep-batch", type=int, default=16, help="images of its step")
    parser.add_argument("--deep-repeats", type=int, default=3, help="steps that are timed")
    parser.add_argument("--checkpoint-every", type=int, nargs="+", default=[0, 18], help="0: all activations stored")
    parser.add_argument("--out", type=Path, default=RESULTS / "depth.json", help="result file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure, write the results and the picture, print a summary."""
    args = parse(argv)
    twins = []
    for depth in args.depths:
        for residual in KINDS.values():
            twins.append(twin := measure_twin(depth, residual, args))
            ratios = [twin[moment][0] / twin[moment][-1] for moment in ("before", "after")]
            print(
                f"{twin['kind']:>9} {depth:>5} layers: first layer's gradient / last layer's "
                f"{ratios[0]:.3g} before and {ratios[1]:.3g} after {args.steps} steps, "
                f"loss {twin['losses'][0]:.3f} -> {twin['losses'][-1]:.3f}",
                flush=True,
            )
    steps = []
    for every in args.checkpoint_every:
        steps.append(
            step := in_own_process(
                measure_step, args.deep, every, args.deep_batch, args.deep_repeats, torch.get_num_threads()
            )
        )
        print(
            f"pre-activation {args.deep} layers, batch {args.deep_batch}, checkpoint_every {every}: "
            f"{statistics.median(step['seconds']):.2f} s a step, "
            f"{step['peak_mib'] - step['idle_mib']:.0f} MiB added by the step",
            flush=True,
        )
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    write_results(args.out, {"settings": settings, "twins": twins, "deep_steps": steps})
    plot(twins, args.out.with_suffix(".png"), args.steps)


if __name__ == "__main__":
    main()
