"""What the training loop itself costs: the share of an epoch outside forward, backward and optimizer, on a CPU.

    python -m bench.loop --presets speed fast notebook

The trainer's own epoch is run on the built-in set with clocks around the calls of its parts: the batches
(augmentation), the network and its loss (forward), backward, and the optimizer. What is left is the loop: schedule,
tally, the check that the loss is finite, progress bar. The printed shares are medians over the epochs after the first.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench.rate import make_trainer
from bench.record import RESULTS, write_results
from bench.tables import markdown
from fastres.train import Trainer, machine
from fastres.train.loss import cross_entropy
from fastres.train.signals import StopRequest

PARTS = ("forward", "backward", "optimizer", "batches")


class Clocks:
    """Seconds spent in each part of the loop, of the wall clock and of the process's processor time."""

    def __init__(self):
        self.wall, self.cpu = dict.fromkeys(PARTS, 0.0), dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.wall[name] += time.perf_counter() - wall
            self.cpu[name] += time.process_time() - cpu

    def around(self, name: str, call: Callable) -> Callable:
        """``call`` with its time counted."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return call(*args, **kwargs)

        return counted

    def around_iterator(self, name: str, call: Callable) -> Callable:
        """``call`` with the time counted that its iterator takes for each item."""

        def counted(*args: Any, **kwargs: Any) -> Iterator:
            items, end = call(*args, **kwargs), object()
            while True:
                with self.part(name):
                    item = next(items, end)
                if item is end:
                    return
                yield item

        return counted


def clocked_epoch(trainer: Trainer, epoch: int) -> dict[str, Any]:
    """Seconds of each part and of the whole of one epoch of the trainer."""
    clocks, update, batches = Clocks(), trainer.update, trainer.train_batches
    trainer.epoch, trainer.batch, trainer.step = epoch, 0, 0
    patches = [
        mock.patch.object(update, "network", clocks.around("forward", update.network)),
        mock.patch("fastres.train.update.cross_entropy", clocks.around("forward", cross_entropy)),
        mock.patch.object(torch.Tensor, "backward", clocks.around("backward", torch.Tensor.backward)),
        mock.patch.object(update.optimizer, "step", clocks.around("optimizer", update.optimizer.step)),
        mock.patch.object(batches, "epoch", clocks.around_iterator("batches", batches.epoch)),
    ]
    for patch in patches:
        patch.start()
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        trainer._train_epoch(StopRequest())
    finally:
        total = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        for patch in reversed(patches):
            patch.stop()
    return {**total, "parts": clocks.wall, "cpu_parts": clocks.cpu}


def shares(epochs: list[dict[str, Any]], clock: str = "") -> dict[str, float]:
    """Median share of each part, of the rest, and of all but forward, backward and optimizer; ``clock``: or "cpu_"."""
    total, parts = f"{clock}seconds", f"{clock}parts"
    result = {name: statistics.median(e[parts][name] / e[total] for e in epochs) for name in PARTS}
    result["rest"] = statistics.median(1 - sum(e[parts].values()) / e[total] for e in epochs)
    outside = (1 - sum(e[parts][name] for name in PARTS[:3]) / e[total] for e in epochs)
    return {**result, "outside": statistics.median(outside)}


def table(found: list[dict[str, Any]]) -> str:
    """A row a preset and clock: wall-clock time, and CPU time, which neighbours disturb less."""
    columns = [*PARTS, "rest", "outside"]
    lines = [
        [f"`{one['preset']}`, {one['dtype']}", clock, *(f"{one[key][column]:.2%}" for column in columns)]
        for one in found
        for clock, key in (("wall", "shares"), ("CPU", "cpu_shares"))
    ]
    return markdown(["preset", "time", *columns], lines)


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", default=["speed", "fast", "notebook"])
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--batch-size", type=int, help="images a step [the preset's]")
    parser.add_argument("--steps", type=int, default=4, help="steps an epoch")
    parser.add_argument("--epochs", type=int, default=5, help="measured epochs, after one to warm up")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS / "loop-cpu.json", help="result file")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    machine.treat_freed_memory(torch.device("cpu"), False)
    rows, load = [], os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        for name in args.presets:
            trainer = make_trainer(name, args.precision, Path(folder), args.batch_size, args.steps)
            epochs = [clocked_epoch(trainer, epoch) for epoch in range(args.epochs + 1)][1:]
            trainer.folder.close()
            facts = {"preset": name, "dtype": str(trainer.dtype).removeprefix("torch.")}
            rows.append({**facts, "shares": shares(epochs), "cpu_shares": shares(epochs, "cpu_"), "epochs": epochs})
    print(table(rows) + "\n")
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    write_results(args.out, {"settings": settings, "load": load, "loop": rows})


if __name__ == "__main__":
    main()
