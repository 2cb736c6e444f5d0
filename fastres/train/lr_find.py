"""The learning-rate range test (Smith 2017, "Cyclical Learning Rates for Training Neural Networks", section 3.3).

The rate rises from step to step, by a factor as in fastai's, until the loss does: where it falls fastest lies a good
peak.
"""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastres.atomic import atomic_write
from fastres.errors import FastresError
from fastres.train.optimizer import set_lr

if TYPE_CHECKING:
    from fastres.train.trainer import Trainer

FILES = TABLE, PICTURE = "lr.csv", "lr.png"
LOWEST, HIGHEST, STEPS = 1e-6, 10.0, 100
_MEMORY = 0.9  # share of the former mean loss that each step keeps
_DIVERGED = 4.0  # multiple of the least mean loss
_FEWEST = 10  # steps that say anything


@dataclass(frozen=True)
class RangeTest:
    """Rates, the loss of each step, and the mean loss until then, which weighs late steps more."""

    rates: list[float]
    losses: list[float]
    means: list[float]

    @property
    def best(self) -> float:
        """The rate at which the mean loss was least."""
        return self.rates[self.means.index(min(self.means))]

    @property
    def suggestion(self) -> float:
        """The rate at which the mean loss fell fastest, by the rate's logarithm, before it was least.

        Raises:
            FastresError: where it never fell.
        """
        least = self.means.index(min(self.means))
        falls = {i: self.means[i - 1] - self.means[i + 1] for i in range(1, least)}  # the steps are of one length
        if not falls or max(falls.values()) <= 0:
            raise FastresError("the loss falls at no learning rate: check the labels, or try another --optimizer")
        return self.rates[max(falls, key=lambda i: falls[i])]


def range_test(trainer: Trainer, steps: int = STEPS) -> RangeTest:
    """Train a fresh trainer at rates from `LOWEST` to `HIGHEST`, until the loss is no number or many times its least.

    The network is not worth anything afterwards.

    Raises:
        FastresError: where the loss is no number from the beginning.
    """
    factor = (HIGHEST / LOWEST) ** (1 / (steps - 1))
    rates: list[float] = []
    losses: list[float] = []
    means: list[float] = []
    trainer.model.train()
    trainer.frozen.apply()
    epoch, former, mean = 0, 0.0, 0.0
    while len(rates) < steps:
        for images, labels in trainer.train_batches.epoch(epoch):
            rate = LOWEST * factor ** len(rates)
            set_lr(trainer.optimizer, rate / trainer.config.lr)
            trainer.learn(images, labels)
            total = trainer.tally.loss.item()
            loss, former = (total - former) / len(labels), total
            if not math.isfinite(loss):
                break
            mean = _MEMORY * mean + (1 - _MEMORY) * loss
            rates.append(rate)
            losses.append(loss)
            means.append(mean / (1 - _MEMORY ** len(rates)))
            if len(rates) == steps or (len(rates) > _FEWEST and means[-1] > _DIVERGED * min(means)):
                break
        else:
            epoch += 1
            continue
        break
    if len(rates) < _FEWEST:
        raise FastresError(f"the loss is no number after {len(rates)} steps at rates up to {rate:.1e}: check the data")
    return RangeTest(rates, losses, means)


def write_range_test(folder: Path, found: RangeTest, title: str) -> None:
    """Write the table and the curve.

    Raises:
        FastresError: where the folder takes no more.
    """
    text = io.StringIO()
    rows = zip(found.rates, found.losses, found.means)
    csv.writer(text, lineterminator="\n").writerows([("learning rate", "loss", "mean loss"), *rows])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in ((TABLE, text.getvalue().encode()), (PICTURE, _picture(found, title))):
            with atomic_write(folder / name) as file:
                file.write(content)
    except OSError as error:
        raise FastresError(f"cannot write to {folder}: {error.strerror or error}; choose another folder") from error


def _picture(found: RangeTest, title: str) -> bytes:
    from matplotlib.figure import Figure  # slow to import; no pyplot, so no global state and no display

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(found.rates, found.losses, alpha=0.3, label="loss of each step")
    axes.plot(found.rates, found.means, label="mean")
    axes.axvline(found.suggestion, linestyle="--", color="black", label=f"steepest fall, {found.suggestion:.2g}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss", ylim=(None, 1.1 * max(found.means)))
    axes.legend()
    axes.set_title(title.encode(errors="replace").decode(), parse_math=False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()
