"""Seconds of whole training runs on a GPU that is not at hand, predicted: ``python -m bench.machine.runs``.

The presets for speed-runs of CIFAR-10, with one CUDA graph a step: steps, times what `bench.machine` predicts of stem
and blocks, and what a step does beside those: pool, last layer and loss, the optimizer with Muon's matrix products, and
the batch with its augmentation. Every ATen call of these is listed by running the project's own code without computing;
a matrix product takes the model's plain product, any other call its bytes at the memory's rate, but a microsecond at
least and the gap to the next launch. Validation, compiling, reading the data and making the first layer's filters are
left out.

The range of a step is from timed choices to Triton alone, under all sets of assumptions that `bench.machine` was asked
for; that of a run is a quarter wider either way, as much as the model's absolute times may be off.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.count_eager import EagerTraffic, fakes
from bench.machine.__main__ import result_path
from bench.machine.chips import CHIPS, LAUNCH, Chip
from bench.machine.peers import TINY
from bench.machine.product import TUNED, product
from bench.record import RESULTS, write_results
from fastres.data.dataset import Dataset, Split
from fastres.models import create_model
from fastres.reference.speed import WhiteningConv
from fastres.train.build import build_batches, build_optimizer
from fastres.train.config import TrainConfig
from fastres.train.evaluate import Tally
from fastres.train.loss import cross_entropy
from fastres.train.presets import preset

PRESETS = ("speed94", "speed95", "speed96")
IMAGES, SIZE, CLASSES = 50_000, 32, 10  # of CIFAR-10
ERROR = 0.25  # of the model's absolute times, either way [A]
ELEMENT = 2  # bytes of what the products of Muon read and write


class Calls(NamedTuple):
    """What a part of a step launches: bytes of each call, and rows, columns and depth of each matrix product."""

    bytes: list[int]
    products: list[tuple[int, int, int]]

    def seconds(self, arch: int, chip: Chip) -> float:
        """Predicted time on a GPU."""
        passes = sum(max(count / chip.bandwidth, TINY) + LAUNCH for count in self.bytes)
        return passes + sum(
            product(m, n, k, ELEMENT * (m * k + k * n + m * n), TUNED, arch, chip).seconds for m, n, k in self.products
        )


_PRODUCTS = {getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm", "baddbmm")}


class _Listed(EagerTraffic):
    """`EagerTraffic` that keeps matrix products apart."""

    def __init__(self):
        super().__init__()
        self.products: list[tuple[int, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func not in _PRODUCTS:
            return super().__torch_dispatch__(func, types, args, kwargs)
        a, b = args[-2:]  # those of a batch are as one with all their rows: as many tiles
        self.products.append((math.prod(a.shape[:-1]), b.shape[-1], a.shape[-1]))
        return func(*args, **(kwargs or {}))


def listed(call: Callable[[], Any]) -> Calls:
    """The launches of a call."""
    with _Listed() as mode:
        call()
    return Calls([one.loaded + one.stored for one in mode.calls], mode.products)


def parts(name: str) -> dict[str, Calls]:
    """What a step of a preset launches beside stem and blocks, by what it is for."""
    config = preset(name)
    images = torch.empty(config.batch_size, 3, SIZE, SIZE)
    model: Any
    mode, model, _ = fakes(trained(config), images)
    with mode:
        optimizer = build_optimizer(config, model, False, torch.device("cpu"))
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        optimizer.step()  # makes its states
        update = listed(optimizer.step)
        features = torch.empty(config.batch_size, model.fc.in_features, 3, 3, dtype=torch.bfloat16, requires_grad=True)
        labels = torch.empty(config.batch_size, dtype=torch.int64)
        head = listed(lambda: _loss(model, features, labels, config))
    return {"head and loss": head, "optimizer": update, "batch": batch_calls(config)}


def trained(config: TrainConfig) -> Any:
    """The preset's network, its whitening layer fixed where the preset fixes it."""
    model = create_model(config.model).to(memory_format=torch.channels_last)
    for module in model.modules():
        if config.whiten and isinstance(module, WhiteningConv):
            module.weight.requires_grad_(False)
    return model


def _loss(model: Any, features: Tensor, labels: Tensor, config: TrainConfig) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.fc(nn.Flatten()(model.avgpool(features)))
    loss = cross_entropy(logits.float(), labels, config.label_smoothing)
    loss.backward()
    Tally.zero(labels.device).add(loss, logits, labels)


def batch_calls(config: TrainConfig) -> Calls:
    """Choosing, cropping, flipping and normalising a batch, and handing it to the graph; of as many images
    as it takes, of CIFAR-10's size and type."""
    pixels = torch.zeros(2 * config.batch_size, 3, SIZE, SIZE, dtype=torch.uint8)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    split = Split(pixels, torch.arange(len(pixels)) % CLASSES)
    classes = tuple(map(str, range(CLASSES)))
    dataset = Dataset(split, split, classes, "zeros", (0.0,) * 3, (1.0,) * 3)
    batches = build_batches(config, dataset, torch.device("cpu"))[0].epoch(0)
    next(batches)
    made: list[Tensor] = []

    def following() -> None:
        images, labels = next(batches)
        made.extend((images, labels))
        for one in (images, labels):  # into the graph's own memory
            torch.empty_like(one).copy_(one)

    return listed(following)


def run_record(name: str, arch: int, results: Path = RESULTS) -> dict[str, Any]:
    """The prediction of a preset's run.

    Raises:
        FileNotFoundError: where `bench.machine` has not predicted its network's step.
    """
    config, chip = preset(name), CHIPS[arch]
    path = result_path(config.model, arch, results)
    if not path.exists():
        raise FileNotFoundError(
            f"predict its step first: python -m bench.machine --sensitivity --network {config.model}"
        )
    network = json.loads(path.read_text())
    if network["batch"] != config.batch_size:
        raise ValueError(f"{path} is of {network['batch']} images, preset {name} has {config.batch_size}")
    blocks = [step[kind] for step in network["steps"].values() for kind in ("Triton", "fused tuned", "fused plain")]
    beside = {what: calls.seconds(arch, chip) for what, calls in parts(name).items()}
    steps = (config.epochs or 0) * (IMAGES // config.batch_size)
    ends = {"low": min(blocks), "high": max(blocks)}
    each = {end: one + sum(beside.values()) for end, one in ends.items()}
    return {
        "preset": name,
        "batch": config.batch_size,
        "epochs": config.epochs,
        "steps": steps,
        "blocks": ends,
        "beside": beside,
        "seconds": {"low": steps * each["low"] * (1 - ERROR), "high": steps * each["high"] * (1 + ERROR)},
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.machine.runs", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--preset", nargs="+", choices=PRESETS, default=list(PRESETS), help="(all)")
    parser.add_argument("--arch", type=int, choices=CHIPS, default=90, help="(90)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the steps' results and of this one")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Predict, print, write the result."""
    args = parse(argv)
    runs = [run_record(name, args.arch, args.results) for name in args.preset]
    for run in runs:
        print(f"{run['preset']}: {run['seconds']['low']:.1f} to {run['seconds']['high']:.1f} s, {run['steps']} steps")
    record = {"kind": "prediction of a model", "arch": args.arch, "chip": CHIPS[args.arch]._asdict(), "runs": runs}
    write_results(args.results / f"runs-sm{args.arch}.json", record)


if __name__ == "__main__":
    main()
