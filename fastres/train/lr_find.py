"""The learning-rate range test (Smith 2017, "Cyclical Learning Rates for Training Neural Networks", section 3.3).

The rate rises from step to step by a factor, until the loss does. The suggestion is the rate by which the loss has
fallen half of its way: below the least loss's, at which steps begin to be too long.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
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
_NEAR = 4  # steps on either side that a mean loss is over
_DIVERGED = 4.0  # multiple of the least mean loss
_FEWEST = 10  # steps that say anything


@dataclass(frozen=True)
class RangeTest:
    """Rates, and the loss of each step."""

    rates: list[float]
    losses: list[float]

    @property
    def means(self) -> list[float]:
        """Of each step the mean loss of those around it."""
        near = [self.losses[max(0, i - _NEAR) : i + _NEAR + 1] for i in range(len(self.losses))]
        return [sum(part) / len(part) for part in near]

    @property
    def best(self) -> float:
        """The rate at which the mean loss was least."""
        means = self.means
        return self.rates[means.index(min(means))]

    @property
    def suggestion(self) -> float:
        """The rate by which the mean loss has fallen half of its way, from the median before its least to that.

        Raises:
            FastresError: where it falls no further than single steps differ.
        """
        means = self.means
        least = means.index(min(means))
        before = means[:least] or [means[0]]
        start, noise = statistics.median(before), statistics.pstdev(a - b for a, b in zip(self.losses, before))
        if start - means[least] <= noise / math.sqrt(_NEAR):
            raise FastresError("the loss falls at no learning rate: check the labels, or try another --optimizer")
        half = (start + means[least]) / 2
        return self.rates[max(i for i in range(least) if means[i] >= half)]


def range_test(trainer: Trainer, steps: int = STEPS) -> RangeTest:
    """Train a fresh trainer at rates from `LOWEST` to `HIGHEST`, until the loss is no number or many times its least.

    The network is not worth anything afterwards.

    Raises:
        FastresError: where the loss is no number from the beginning.
    """
    factor = (HIGHEST / LOWEST) ** (1 / (steps - 1))
    rates: list[float] = []
    losses: list[float] = []
    trainer.model.train()
    trainer.frozen.apply()
    epoch, former, least = 0, 0.0, math.inf
    while len(rates) < steps:
        for images, labels in trainer.train_batches.epoch(epoch):
            rate = LOWEST * factor ** len(rates)
            set_lr(trainer.optimizer, rate / trainer.config.lr)
            trainer.learn(images, labels)
            total = trainer.tally.loss.item()
            loss, former = (total - former) / len(labels), total
            if not math.isfinite(loss):
                break
            rates.append(rate)
            losses.append(loss)
            last = losses[-_NEAR:]
            least = min(least, sum(last) / len(last))
            if len(rates) == steps or (len(rates) > _FEWEST and min(last) > _DIVERGED * least):
                break
        else:
            epoch += 1
            continue
        break
    if len(rates) < _FEWEST:
        raise FastresError(f"the loss is no number after {len(rates)} steps at rates up to {rate:.1e}: check the data")
    return RangeTest(rates, losses)


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
    axes.axvline(found.suggestion, linestyle="--", color="black", label=f"half of the fall, {found.suggestion:.2g}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss", ylim=(None, 1.1 * max(found.means)))
    axes.legend()
    axes.set_title(title.encode(errors="replace").decode(), parse_math=False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()
