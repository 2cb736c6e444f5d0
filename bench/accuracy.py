"""Time to accuracy on one machine, in one run: a preset, its network in a plain loop, and two other recipes.

    python -m bench.accuracy --preset speed94 --data cifar10 --target 0.895

- ``fastres``: the preset through `fastres.train`.
- ``plain``: the same network, optimizer, schedule, whitening and loss in `bench.plain`'s loop; it crops by the same
  padding and flips at random. fp32, contiguous, two worker processes.
- ``airbench``, ``airbench95``: the networks and recipes of `bench.airbench`, under torch.compile in bf16.
- ``resnet18``: ResNet-18 with the CIFAR stem as it is mostly trained: SGD at 0.1, momentum 0.9, L2 5e-4, batches of
  128, crops padded by 4 zeros, cosine over ``--resnet18-epochs``; in the plain loop.

Each trains until the first epoch's end with the target accuracy (of single images, no mirror images). Seconds are of
training, without validation and loading of data; those with validation are recorded for the preset. A plain loop that
takes ``--limit`` times as long as the preset is stopped: its ratio is then a lower bound, and said to be. A contestant
that is in the result file already is not run again, so an interrupted run goes on; each has a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

import torch

from bench import airbench, plain
from bench.record import RESULTS, ROOT, write_results
from bench.tables import markdown
from fastres import data
from fastres.data import Dataset
from fastres.models import create_model
from fastres.train import TrainConfig, Trainer, machine, preset
from fastres.train.build import build_optimizer
from fastres.train.optimizer import set_lr
from fastres.train.run_folder import RunFolder
from fastres.train.schedule import lr_factor
from fastres.train.whiten import whiten

AIRBENCH = {"airbench": airbench.AIRBENCH94, "airbench95": airbench.AIRBENCH95}
CONTESTANTS = ["fastres", "plain", *AIRBENCH, "resnet18"]
IN_PLAIN_LOOP = ("plain", "resnet18")  # which has worker processes


def fastres_rows(config: TrainConfig, dataset: Dataset) -> list[dict[str, Any]]:
    """The preset's rows, an epoch each."""
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder) / "run")
        try:
            return Trainer(config, dataset, run).fit()
        finally:
            run.close()


def plain_rows(
    config: TrainConfig, dataset: Dataset, workers: int, target: float, limit: float, device: torch.device
) -> list[dict[str, Any]]:
    """The same recipe in the plain loop."""
    torch.manual_seed(config.seed)
    model = create_model(config.model, num_classes=len(dataset.classes))
    if config.whiten:
        whiten(model, dataset)
    model.to(device)
    optimizer = build_optimizer(config, model, scaled=False, lr_on=None)
    train, test = plain.loaders(dataset, config.batch_size, config.crop_pad, "reflect", workers, device)
    epochs, smoothing = cast(int, config.epochs), config.label_smoothing
    steps = epochs * len(train)

    def set_rate(step: int) -> None:
        set_lr(optimizer, lr_factor(config.schedule, step, steps, config.warmup))

    return plain.train(model, optimizer, set_rate, train, test, epochs, smoothing, target, limit)


def resnet18_rows(
    dataset: Dataset, epochs: int, workers: int, seed: int, target: float, limit: float, device: torch.device
) -> list[dict[str, Any]]:
    """ResNet-18's usual recipe in the plain loop."""
    torch.manual_seed(seed)
    model = create_model("resnet18", num_classes=len(dataset.classes), stem="cifar").to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    train, test = plain.loaders(dataset, 128, 4, "constant", workers, device)

    def set_rate(step: int) -> None:
        optimizer.param_groups[0]["lr"] = 0.1 * lr_factor("cosine", step, epochs * len(train), 0.0)

    return plain.train(model, optimizer, set_rate, train, test, epochs, 0.0, target, limit)


def reached(rows: list[dict[str, Any]], target: float) -> dict[str, Any] | None:
    """The first row with the target accuracy."""
    return next((row for row in rows if row["val_accuracy"] >= target), None)


def table(results: dict[str, list[dict]], target: float) -> str:
    """A row a contestant."""
    columns = ["", "training seconds", "accuracy", "over several views", "to the preset"]
    return markdown(columns, ratios(results, target))


def ratios(results: dict[str, list[dict]], target: float) -> list[list[str]]:
    """A line of the table for each contestant: name, seconds, accuracies, how many times as long as the preset."""
    ours, lines = reached(results["fastres"], target), []
    for name, rows in results.items():
        hit = reached(rows, target)
        row = hit or rows[-1]
        more = "" if hit else "more than "
        factor = f"{more}{row['train_seconds'] / ours['train_seconds']:.1f}x" if ours else ""
        views = "" if row.get("tta_accuracy") is None else f"{row['tta_accuracy']:.2%}"
        lines.append([name, f"{more}{row['train_seconds']:.0f}", f"{row['val_accuracy']:.2%}", views, factor])
    return lines


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="auto", help="as of `fastres train`")
    parser.add_argument("--target", type=float, required=True, help="accuracy in [0, 1] that ends a run")
    parser.add_argument("--preset", default="speed")
    parser.add_argument("--epochs", type=int, help="of the preset and its plain twin [the preset's]")
    parser.add_argument("--resnet18-epochs", type=int, default=15)
    parser.add_argument("--limit", type=float, default=10.0, help="times the preset's seconds that others may take")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=CONTESTANTS)
    parser.add_argument("--limit-train", type=int)
    parser.add_argument("--limit-test", type=int)
    parser.add_argument("--workers", type=int, default=2, help="processes of a plain loop's DataLoader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N [cpu]")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS / "time-to-accuracy-cpu.json", help="result file")
    return parser.parse_args(argv)


def settings_of(args: argparse.Namespace, dataset: Dataset, config: TrainConfig) -> dict[str, Any]:
    """What two results must share to be compared."""
    left_out = {"out", "data", "contestants"}
    settings = {name: value for name, value in vars(args).items() if name not in left_out}
    return {**settings, "data": dataset.label, "options": config.to_dict()}


def run_one(name: str, args: argparse.Namespace) -> None:
    """Add a contestant's rows to the result file, if it is not in there yet."""
    torch.set_num_threads(args.threads)
    device = machine.pick_device(args.device)
    if name == "fastres":
        machine.treat_freed_memory(device, False)
    dataset = data.limit(data.load(args.data), args.limit_train, args.limit_test)
    config = preset(args.preset).replace(seed=args.seed, device=args.device)
    if args.epochs:
        config = config.replace(epochs=args.epochs, steps=None)
    if config.epochs is None:
        raise SystemExit(f"preset {args.preset} is measured in steps: add --epochs")
    content = {"settings": settings_of(args, dataset, config), "load_5_minutes": {}, "results": {}}
    if args.out.exists():
        before = json.loads(args.out.read_text())
        if before["settings"] != content["settings"]:
            raise SystemExit(f"{args.out} was made with other settings: choose another --out or delete it")
        content = {key: before[key] for key in content}
    results = content["results"]
    if name in results:
        return
    ours = reached(results.get("fastres", []), args.target)
    limit = args.limit * ours["train_seconds"] if ours else float("inf")
    if name == "fastres":
        results[name] = fastres_rows(config, dataset)
    elif name == "plain":
        results[name] = plain_rows(config, dataset, args.workers, args.target, limit, device)
    elif name in AIRBENCH:
        results[name] = airbench.rows(AIRBENCH[name], dataset, args.seed, args.target, limit, device=device)
    else:
        epochs = args.resnet18_epochs
        results[name] = resnet18_rows(dataset, epochs, args.workers, args.seed, args.target, limit, device)
    content["load_5_minutes"][name] = os.getloadavg()[1]
    write_results(args.out, content)
    if name == "fastres" and not reached(results[name], args.target):
        raise SystemExit(f"the preset did not reach {args.target:.2%}: lower --target or raise --epochs")


def main(argv: list[str] | None = None) -> None:
    """Run who has not run yet, each in a process of its own, and print the table."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if len(args.contestants) == 1:
        return run_one(args.contestants[0], args)
    for name in args.contestants:
        done = subprocess.run([sys.executable, "-m", "bench.accuracy", *argv, "--contestants", name], cwd=ROOT)
        if done.returncode:
            raise SystemExit(done.returncode)
    content = json.loads(args.out.read_text())
    print(f"{args.target:.2%} on {content['settings']['data']}, {args.threads} threads\n")
    print(table(content["results"], args.target))


if __name__ == "__main__":
    main()
