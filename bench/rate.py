"""Training rate of the presets on this machine, images per second, in each precision.

    python -m bench.rate --precisions fp32 bf16 --threads 1

Each measurement is a few whole training steps (augmentation, forward, backward, optimizer) on the built-in set. The
combinations take turns, so that whatever else the machine does meets all of them alike; the printed rates are medians
over the turns, of the wall clock and of the process's own processor time, which other processes disturb less.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch

from bench.record import RESULTS, write_results
from fastres.data.dataset import make_dataset
from fastres.data.synthetic import CLASSES, LABEL, synthetic_split
from fastres.train import Trainer, machine, preset
from fastres.train.run_folder import RunFolder


def make_trainer(name: str, precision: str, folder: Path, batch_size: int | None, steps: int) -> Trainer:
    """A trainer of a preset on just enough drawn images; nothing is ever saved to the folder."""
    config = preset(name).replace(precision=precision)
    if batch_size is not None:
        config = config.replace(batch_size=batch_size)
    split = synthetic_split(config.batch_size * steps)
    dataset = make_dataset(split, split, CLASSES, LABEL)
    return Trainer(config, dataset, RunFolder(folder / f"{name}-{precision}"), say=lambda line: None)


def turn(trainer: Trainer, epoch: int) -> dict[str, float]:
    """One pass over the images: wall and processor seconds."""
    trainer.model.train()
    wall, cpu = time.perf_counter(), time.process_time()
    for images, labels in trainer.train_batches.epoch(epoch):
        trainer.train_step(images, labels)
    trainer.check_finite()  # waits for the device
    return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", default=["fast", "speed", "speed94", "notebook"])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--batch-size", type=int, help="images a step [the preset's]")
    parser.add_argument("--steps", type=int, default=3, help="steps a turn")
    parser.add_argument("--turns", type=int, default=5, help="measured turns, after one to warm up")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS / "rate-cpu.json", help="result file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure, print the medians, write the results."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    machine.treat_freed_memory(torch.device("cpu"), False)
    with tempfile.TemporaryDirectory() as folder:
        trainers = {
            pair: make_trainer(*pair, Path(folder), args.batch_size, args.steps)
            for pair in product(args.presets, args.precisions)
        }
        turns: dict[tuple, list] = {pair: [] for pair in trainers}
        for number in range(args.turns + 1):
            for pair, trainer in trainers.items():
                measured = turn(trainer, number)
                if number > 0:
                    turns[pair].append(measured)
        for trainer in trainers.values():
            trainer.folder.close()
    rows: list[dict[str, Any]] = []
    for (name, precision), measurements in turns.items():
        images = len(trainers[name, precision].train_batches) * trainers[name, precision].config.batch_size
        row = {"preset": name, "precision": precision, "images": images, "turns": measurements}
        for clock in ("seconds", "cpu_seconds"):
            row[f"images_per_{clock[:-1]}"] = statistics.median(images / one[clock] for one in measurements)
        rows.append(row)
        print(
            f"{name:>10} {precision}: {row['images_per_second']:7.1f} images/s, "
            f"{row['images_per_cpu_second']:7.1f} per second of processor time, {args.threads} threads"
        )
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    load = os.getloadavg()[0]
    write_results(args.out, {"settings": settings, "load": load, "rates": rows})


if __name__ == "__main__":
    main()
