"""The training loop: one object that holds a run's whole state and can save, resume and finish it."""

from __future__ import annotations

import math
import signal
import time
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastres.data import Dataset
from fastres.errors import FastresError
from fastres.train import machine, pretrained, report, state
from fastres.train.average import WeightAverage
from fastres.train.best import held_epoch
from fastres.train.build import (
    build_batches,
    build_model,
    build_optimizer,
    check_center_share,
    image_size,
    model_options,
    with_statistics,
)
from fastres.train.callbacks import Callback, call_all
from fastres.train.config import TrainConfig
from fastres.train.distributed import ALONE, Onlooker, Ranks, rank_device
from fastres.train.evaluate import Tally, all_finite, evaluate
from fastres.train.layers import Frozen
from fastres.train.loss import balanced_weights
from fastres.train.optimizer import set_lr
from fastres.train.progressive import parse_progressive, size_at
from fastres.train.run_folder import RunFolder
from fastres.train.schedule import lr_factor, parse_milestones
from fastres.train.signals import Interrupted, StopRequest
from fastres.train.update import GraphedUpdate, Update

# fp16's gradient scaler halves the scale at each step it skips, without end; gradients that overflow below this are
# lost
LEAST_SCALE = 1.0
MUCH = 0.2  # share of an epoch's time in which the next images were not ready


class NonFiniteLoss(FastresError):
    """The loss became NaN or infinite; the last good checkpoint is left as it was."""


class OverflowingGradients(FastresError):
    """Gradients overflow fp16 whatever the loss is scaled by; the last good checkpoint is left as it was."""


class Trainer:
    """Trains one network on one dataset and keeps its run folder.

    Every random choice is a function of (seed, epoch, step), and `save` stores all that is summed up over steps,
    so a resumed run goes on bit for bit. The process' own switches and random numbers are left as they are: what a run
    needs of them is set while it runs.

    Args:
        config: checked options.
        dataset: images and labels, see `fastres.data.load`.
        folder: where checkpoints and metrics go.
        say: prints one line, of the first rank.
        ranks: the processes that train together; each one has a trainer of the same options.
        callbacks: hear of each epoch, see `fastres.train.callbacks`.

    Raises:
        FastresError: when the options do not fit the data or the machine.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: Dataset,
        folder: RunFolder | Onlooker,
        say: Callable[[str], None] = tqdm.write,
        ranks: Ranks = ALONE,
        callbacks: Sequence[Callback] = (),
    ):
        self.callbacks = callbacks if ranks.first else ()
        self.folder, self.ranks = folder, ranks
        self.say = say if ranks.first else lambda line: None
        self.device = machine.pick_device(rank_device(config.device, ranks))
        goes_on = config.weights is not None and ranks.of_first(folder.begun)  # it has weights, and options, of its own
        if config.weights is not None and not goes_on:
            config = ranks.of_first(lambda: pretrained.settled(config))
        self.config = config = machine.settled(config, self.device, ranks.of_first)
        check_center_share(config, dataset)
        self.dataset = dataset = with_statistics(config, dataset)
        self.dtype = machine.pick_dtype(config.precision, self.device)
        graphed = machine.takes_graph(config, self.device, self.dtype, ranks.count)
        machine.use_device(self.device)
        if config.compile:
            machine.check_compile(self.device)

        self.train_batches, self.val_batches = build_batches(config, dataset, self.device, ranks)
        self.total_steps = config.steps or cast(int, config.epochs) * len(self.train_batches)
        self.stages = parse_progressive(config.progressive) if config.progressive else ()
        self.milestones = parse_milestones(config.milestones)

        self.image_size = image_size(config, dataset)
        if config.views is not None:
            config.views.check(self.image_size)
        self.model_options = model_options(config, self.image_size)
        self.backend = config.backend
        if config.sync_bn and ranks.count > 1 and self.backend == "eager" and self.device.type == "cpu":
            raise FastresError("--sync-bn of an eager network needs GPUs: add --backend fused")
        self.weights: str | None = None  # digest of those that it started from
        self.model = build_model(
            config, dataset, self.device, lambda model: None if goes_on else self._start_from(model)
        )
        self.frozen = Frozen(self.model, config.freeze)
        network = ranks.wrap(self.model, config.sync_bn)
        self.average = WeightAverage(self.model, config.ema) if config.ema is not None else None
        scaled = self.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        self.optimizer = build_optimizer(config, self.model, scaled, self.device if graphed else None)
        self.tally = Tally.zero(self.device)
        class_weights = None
        if config.class_weights == "balanced":
            class_weights = balanced_weights(dataset.train.labels, len(dataset.classes)).to(self.device)
        self.update = Update(
            network=torch.compile(network) if config.compile else network,
            parameters=list(self.model.parameters()),
            optimizer=self.optimizer,
            scaler=self.scaler,
            tally=self.tally,
            dtype=self.dtype,
            label_smoothing=config.label_smoothing,
            class_weights=class_weights,
            accumulate=config.accumulate,
            without_exchange=partial(ranks.without_exchange, network),
            clip=config.clip,
            average=self.average,
        )
        self.learn = GraphedUpdate(self.update) if graphed else self.update

        self._columns = config.tta, scaled  # of the table
        self.step = self.epoch = self.batch = 0  # batch: steps done in the current epoch
        self.seconds = self.train_seconds = self.epoch_seconds = 0.0  # train_seconds: without validation
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None  # the row of the epoch that best.pt is of
        self.run = uuid.uuid4().hex  # no other run has it, so that their files are not taken for one another's
        self.first_step: float | None = None  # seconds that this process' first step took the host: it may compile
        self._waited, self._told = 0.0, False  # for fed images, until the epoch began
        self._saved_step: int | None = None  # that last.pt is of
        self._began = self._saved_at = time.monotonic()

    def _start_from(self, model: nn.Module) -> None:
        """Give the fresh network the weights that are asked for; the ranks get rank 0's."""
        if self.config.weights is not None and self.ranks.first:
            weights = pretrained.read_weights(self.config.weights, self.config.model)
            self.weights = weights.digest
            self.say(pretrained.load_pretrained(model, weights, self.dataset.classes, self.config.model))

    @property
    def evaluated(self) -> nn.Module:
        """The network whose accuracy counts: the weight average if there is one."""
        return self.average.module if self.average is not None else self.model

    def fit(self) -> list[dict[str, Any]]:
        """Train to the end and return the table's rows.

        Raises:
            NonFiniteLoss: when the loss is NaN or infinite.
            OverflowingGradients: when fp16's gradients are, at every scale of the loss.
            Interrupted: after a signal that asks it to end, with the state saved; after a second one at once.
        """
        if note := machine.building_note(self.device, self.backend):
            self.say(note)
        self.say(report.heading(*self._columns))
        for row in self.history:
            self.say(report.line(row, *self._columns))
        if self.history:
            self.folder.restore_rows(self.history)  # a process that was killed may have saved a row only in last.pt
        self._saved_at = time.monotonic()
        try:
            return self._fit()
        finally:
            self.train_batches.close()

    def _fit(self) -> list[dict[str, Any]]:
        with machine.algorithms(self.config.deterministic), self.ranks.stop_request(self._end_at_once) as stop:
            # a run may have been stopped before its last validation
            while (self.step < self.total_steps or self.batch) and not self._is_hopeless():
                if not self._epoch_is_over():
                    self._train_epoch(stop)
                if stop.signum is None:
                    self._end_epoch(stop)
                if stop.signum is not None and (self.step < self.total_steps or self.batch):
                    self._stop(stop.signum)
        if self.step < self.total_steps:
            self.say(f"no better epoch in {self.config.patience}: ended after step {self.step} of {self.total_steps}")
        self.folder.write_curves(self.history, self.dataset.label)
        return self.history

    def _is_hopeless(self) -> bool:
        """Whether the best epoch lies as many epochs back as the run's patience reaches."""
        if self.config.patience is None or self.batch or not self.history:
            return False
        return self.epoch - max(self.history, key=report.rank)["epoch"] >= self.config.patience

    def _epoch_is_over(self) -> bool:
        return self.batch == len(self.train_batches) or self.step == self.total_steps

    def _train_epoch(self, stop: StopRequest) -> None:
        self.model.train()
        self.frozen.apply()
        last = min(len(self.train_batches), self.batch + self.total_steps - self.step)
        bar = tqdm(
            total=last, initial=self.batch, desc=f"epoch {self.epoch + 1}", unit="batch", leave=False,
            disable=None if self.ranks.first else True,
        )  # fmt: skip
        self._began = time.perf_counter()
        with bar:
            for images, labels in self.train_batches.epoch(self.epoch, self.batch, self._size_at):
                self.train_step(images, labels)
                bar.update()
                stop.poll(self._minutes_are_over())
                if stop.signum is not None or self._epoch_is_over():
                    break
                if stop.save or (self.config.save_steps and self.step % self.config.save_steps == 0):
                    self._count_time()
                    self._save_within_epoch()
                    self._began = time.perf_counter()
        self._count_time()

    def _minutes_are_over(self) -> bool:
        minutes = self.config.save_minutes
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    def _count_time(self) -> None:
        """Add the time since the epoch's steps began, or were last counted."""
        self.check_finite()  # waits for the device, so that the time is the work's
        elapsed = time.perf_counter() - self._began
        self.seconds += elapsed
        self.train_seconds += elapsed
        self.epoch_seconds += elapsed

    def _size_at(self, batch: int) -> int | None:
        """Pixels a side of the present epoch's images at a batch; None: their own size."""
        return size_at(self.stages, self.step - self.batch + batch, self.total_steps)

    def train_step(self, images: Tensor, labels: Tensor) -> None:
        """One optimizer step on images [B, 3, H, W] and labels int64 [B]; on a CPU it raises `NonFiniteLoss`.

        Raises:
            OverflowingGradients: when fp16's gradient scaler skipped the step and can scale by no less.
        """
        set_lr(self.optimizer, self.lr_factor(self.step))
        skipped, began = self.tally.skipped, time.perf_counter()
        with machine.algorithms(self.config.deterministic):
            self.learn(images, labels)
        if self.first_step is None:
            self.first_step = time.perf_counter() - began
        if (
            self.tally.skipped > skipped and self.scaler.get_scale() < LEAST_SCALE
        ):  # to skip, the scaler has waited itself
            raise OverflowingGradients(
                f"gradients overflow fp16 in epoch {self.epoch + 1}, step {self.step + 1}, at every loss scale down to "
                f"{LEAST_SCALE:g}: add --precision bf16 or fp32, or lower --lr (now {self.config.lr}); {self._kept()}"
            )
        if self.device.type == "cpu":
            self.check_finite()  # free here; on a GPU it would stall every step, so there it waits for the epoch
        self.step += 1
        self.batch += 1

    def lr_factor(self, step: int) -> float:
        """Factor of the peak learning rate at a step."""
        config = self.config
        return lr_factor(config.schedule, step, self.total_steps, config.warmup, self.milestones, config.decay_factor)

    def check_finite(self) -> None:
        """Wait for the device and raise `NonFiniteLoss` if the epoch's loss so far is not finite."""
        if not math.isfinite(self.tally.loss.item()):
            self._raise_non_finite("training")

    def _raise_non_finite(self, which: str) -> None:
        raise NonFiniteLoss(
            f"the {which} loss is NaN or infinite in epoch {self.epoch + 1}, step {self.step + 1}: lower --lr "
            f"(now {self.config.lr}) or set --clip; {self._kept()}"
        )

    def _kept(self) -> str:
        return f"{self.folder.last} is the last good checkpoint" if self.folder.last.exists() else "no checkpoint yet"

    def _end_epoch(self, stop: StopRequest) -> None:
        """Validate, save and report; a stop request in the validation leaves it to the resumed run."""
        start = time.perf_counter()
        self._share_statistics()
        # several views take a forward each: as much as a third of an epoch
        may_be_last = self.step >= self.total_steps or self.config.patience is not None
        scores = evaluate(
            self.evaluated, self.val_batches, self.dtype, self.config.views if may_be_last else None,
            lambda: stop.signum is not None, self.ranks, self.say,
        )  # fmt: skip
        if scores is None:
            return
        val_seconds = time.perf_counter() - start
        if not math.isfinite(scores.loss):
            self._raise_non_finite("validation")
        self.seconds += val_seconds
        trained = self.tally.total(self.ranks)
        train_loss, train_accuracy = trained.means()
        waited = self.train_batches.waited - self._waited
        row = {
            "epoch": self.epoch + 1,
            "step": self.step,
            "lr": self.config.lr * self.lr_factor(self.step - 1),
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "val_loss": scores.loss,
            "val_accuracy": scores.accuracy,
            "tta_accuracy": scores.tta_accuracy,
            "skipped_steps": trained.skipped,
            "images_per_second": trained.images / self.epoch_seconds,
            "train_seconds_per_batch": self.epoch_seconds / self.batch,
            "val_seconds_per_batch": val_seconds / len(self.val_batches),
            "waited_seconds": waited,
            "peak_memory_mib": machine.peak_memory_mib(self.device),
            "train_seconds": self.train_seconds,
            "seconds": self.seconds,
        }
        improved = self.best is None or report.rank(row) > report.rank(self.best)
        self.history.append(row)
        self.epoch += 1
        steps, waits = self.batch, waited / self.epoch_seconds
        self.batch, self.epoch_seconds = 0, 0.0
        self.tally.reset()
        self._waited = self.train_batches.waited
        self.save()
        if improved:
            self.best = row
            self._save_best()
        self.folder.write_events(row)
        self.folder.write_metrics(self.history)
        self.say(report.line(row, *self._columns))
        call_all(self.callbacks, self, row)
        if waits > MUCH and not self._told:
            self._told = True
            self.say(f"{waits:.0%} of the time went into waiting for images: more --workers may decode them faster")
        if row["skipped_steps"] == steps:
            self.say(
                f"no step of epoch {self.epoch} was taken, as gradients overflowed fp16 at a loss scale of "
                f"{self.scaler.get_scale():g} and above: if the next epochs skip as many, add --precision bf16 or fp32"
            )

    def _share_statistics(self) -> None:
        """Make running statistics the mean over the ranks; synchronised ones are the same everywhere as they are."""
        if not self.config.sync_bn:
            self.ranks.average_buffers(self.model)
            if self.average is not None:
                self.ranks.average_buffers(self.average.module)

    def _save_within_epoch(self) -> None:
        if not all_finite(self.model.parameters()):  # the last step's loss did not show it yet
            self._raise_non_finite("next training")
        self._share_statistics()
        self.save()

    def _end_at_once(self, signum: int) -> NoReturn:
        """A second signal: nothing more is saved."""
        saved = "nothing is saved" if self._saved_step is None else f"{self.folder.last} is of step {self._saved_step}"
        raise Interrupted(
            signum,
            f"ended at once by {signal.Signals(signum).name} in step {self.step + 1}, the second signal; {saved}",
        )

    def _stop(self, signum: int) -> NoReturn:
        self._save_within_epoch()
        self.folder.write_curves(self.history, self.dataset.label)
        raise Interrupted(
            signum,
            f"stopped by {signal.Signals(signum).name} after step {self.step} of {self.total_steps}; "
            f"go on with `fastres train --resume {self.folder.path}`",
        )

    def save(self) -> None:
        """Write everything that a resumed run needs to ``last.pt``, atomically."""
        content = {**state.identity(self), **state.progress(self)}
        if self.ranks.first:
            self.folder.save(content)
        self._saved_step, self._saved_at = self.step, time.monotonic()

    def resume(self) -> None:
        """Take up the state of ``last.pt``, which only the first rank need see; it may be of another number of ranks.

        Where it is damaged, that of the checkpoint before it, with a warning.

        Raises:
            CheckpointError: when it is missing, damaged, or of another network.
            FastresError: when it is of another run, or was trained on other data.
        """
        at = self.device if self.ranks.count == 1 else "cpu"
        saved = self.ranks.of_first(lambda: self.folder.load(at, self.say))
        state.take_up(self, saved, self.folder.last)
        self._saved_step = self.step
        if self.step > self.total_steps:
            raise FastresError(
                f"{self.folder.path} has {self.step} steps already, more than the {self.total_steps} that are asked "
                "for: raise --epochs or --steps"
            )
        held = self.ranks.of_first(lambda: held_epoch(self))
        self.best = next((row for row in self.history if row["epoch"] == held), None)

    def _save_best(self) -> None:
        if self.ranks.first:
            self.folder.save_best({**state.identity(self), "weights": self.evaluated.state_dict()})
