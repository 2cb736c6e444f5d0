"""The training loop: one object that holds a run's whole state and can save, resume and finish it."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastres.data import Dataset
from fastres.errors import FastresError
from fastres.train import machine, report
from fastres.train.average import WeightAverage
from fastres.train.build import build_batches, build_model, build_optimizer, image_size, model_options
from fastres.train.checkpoint import CheckpointError, load_checkpoint, load_weights, save_checkpoint
from fastres.train.config import TrainConfig
from fastres.train.distributed import ALONE, Onlooker, Ranks, rank_device
from fastres.train.evaluate import Tally, all_finite, evaluate
from fastres.train.optimizer import set_lr
from fastres.train.progressive import parse_progressive, size_at
from fastres.train.run_folder import RunFolder
from fastres.train.schedule import lr_factor, parse_milestones
from fastres.train.signals import StopRequest
from fastres.train.update import GraphedUpdate, Update

# fp16's gradient scaler halves the scale at each step it skips, without end; gradients that overflow below this are lost
LEAST_SCALE = 1.0


class NonFiniteLoss(FastresError):
    """The loss became NaN or infinite; the last good checkpoint is left as it was."""


class OverflowingGradients(FastresError):
    """Gradients overflow fp16 whatever the loss is scaled by; the last good checkpoint is left as it was."""


class Interrupted(Exception):
    """SIGINT or SIGTERM ended the run after its state was saved."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


class Trainer:
    """Trains one network on one dataset and keeps its run folder.

    Every random choice is a function of (seed, epoch, step), and `save` stores all that is summed up over steps,
    so a resumed run goes on bit for bit.

    Args:
        config: checked options.
        dataset: images and labels, see `fastres.data.load`.
        folder: where checkpoints and metrics go.
        say: prints one line, of the first rank.
        ranks: the processes that train together; each one has a trainer of the same options.

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
    ):
        self.config, self.dataset, self.folder, self.ranks = config, dataset, folder, ranks
        self.say = say if ranks.first else lambda line: None
        self.device = machine.pick_device(rank_device(config.device, ranks))
        self.dtype = machine.pick_dtype(config.precision, self.device)
        machine.set_deterministic(config.deterministic)
        machine.check_cuda_graph(config.cuda_graph, self.device, self.dtype)
        if config.cuda_graph and ranks.count > 1:
            raise FastresError("--cuda-graph cannot hold the exchange between ranks: leave it out")
        machine.use_device(self.device)
        if config.compile:
            machine.check_compile(self.device)

        self.train_batches, self.val_batches = build_batches(config, dataset, self.device, ranks)
        self.total_steps = config.steps or cast(int, config.epochs) * len(self.train_batches)
        self.stages = parse_progressive(config.progressive) if config.progressive else ()
        self.milestones = parse_milestones(config.milestones)

        self.image_size = image_size(config, dataset)
        self.model_options = model_options(config, self.image_size)
        self.backend = machine.pick_backend(config.backend, self.device)
        if config.sync_bn and ranks.count > 1 and self.backend == "eager" and self.device.type == "cpu":
            raise FastresError("--sync-bn of an eager network needs GPUs: add --backend fused")
        self.model = build_model(config, dataset, self.device)
        network = ranks.wrap(self.model, config.sync_bn)
        self.average = WeightAverage(self.model, config.ema) if config.ema is not None else None
        scaled = self.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        self.optimizer = build_optimizer(config, self.model, scaled, self.device)
        self.tally = Tally.zero(self.device)
        self.update = Update(
            network=torch.compile(network) if config.compile else network,
            parameters=list(self.model.parameters()),
            optimizer=self.optimizer,
            scaler=self.scaler,
            tally=self.tally,
            dtype=self.dtype,
            label_smoothing=config.label_smoothing,
            accumulate=config.accumulate,
            without_exchange=partial(ranks.without_exchange, network),
            clip=config.clip,
            average=self.average,
        )
        self.learn = GraphedUpdate(self.update) if config.cuda_graph else self.update

        self._columns = config.tta, scaled  # of the table
        self.step = self.epoch = self.batch = 0  # batch: steps done in the current epoch
        self.seconds = self.train_seconds = self.epoch_seconds = 0.0  # train_seconds: without validation
        self.history: list[dict[str, Any]] = []

    @property
    def evaluated(self) -> nn.Module:
        """The network whose accuracy counts: the weight average if there is one."""
        return self.average.module if self.average is not None else self.model

    @property
    def best_accuracy(self) -> float:
        """Best validation accuracy so far; 0 before the first epoch's end."""
        return max((row["val_accuracy"] for row in self.history), default=0.0)

    def fit(self) -> list[dict[str, Any]]:
        """Train to the end and return the table's rows.

        Raises:
            NonFiniteLoss: when the loss is NaN or infinite.
            OverflowingGradients: when fp16's gradients are, at every scale of the loss.
            Interrupted: after a SIGINT or SIGTERM, with the state saved.
        """
        self.say(report.heading(*self._columns))
        for row in self.history:
            self.say(report.line(row, *self._columns))
        if self.history:
            self.folder.write_metrics(self.history)  # a process that was killed may have saved a row only in last.pt
        with self.ranks.stop_request() as stop:
            while self.step < self.total_steps or self.batch:  # a run may have been stopped before its last validation
                if not self._epoch_is_over():
                    self._train_epoch(stop)
                if stop.signum is None:
                    self._end_epoch(stop)
                if stop.signum is not None and (self.step < self.total_steps or self.batch):
                    self._stop(stop.signum)
        self.folder.write_curves(self.history, self.dataset.label)
        return self.history

    def _epoch_is_over(self) -> bool:
        return self.batch == len(self.train_batches) or self.step == self.total_steps

    def _train_epoch(self, stop: StopRequest) -> None:
        self.model.train()
        last = min(len(self.train_batches), self.batch + self.total_steps - self.step)
        bar = tqdm(
            total=last, initial=self.batch, desc=f"epoch {self.epoch + 1}", unit="batch", leave=False,
            disable=None if self.ranks.first else True,
        )  # fmt: skip
        start = time.perf_counter()
        with bar:
            for images, labels in self.train_batches.epoch(self.epoch, self.batch, self._size_at):
                self.train_step(images, labels)
                bar.update()
                stop.poll()
                if stop.signum is not None or self._epoch_is_over():
                    break
        self.check_finite()  # waits for the device, so that the time below is the work's
        elapsed = time.perf_counter() - start
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
        set_lr(self.optimizer, self._lr_factor(self.step))
        skipped = self.tally.skipped
        self.learn(images, labels)
        if self.tally.skipped > skipped and self.scaler.get_scale() < LEAST_SCALE:  # to skip, the scaler has waited itself
            raise OverflowingGradients(
                f"gradients overflow fp16 in epoch {self.epoch + 1}, step {self.step + 1}, at every loss scale down to "
                f"{LEAST_SCALE:g}: add --precision bf16 or fp32, or lower --lr (now {self.config.lr}); {self._kept()}"
            )
        if self.device.type == "cpu":
            self.check_finite()  # free here; on a GPU it would stall every step, so there it waits for the epoch
        self.step += 1
        self.batch += 1

    def _lr_factor(self, step: int) -> float:
        config = self.config
        return lr_factor(
            config.schedule, step, self.total_steps, config.warmup, self.milestones, config.decay_factor
        )

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
        scores = evaluate(
            self.evaluated, self.val_batches, self.dtype, self.config.tta, lambda: stop.signum is not None, self.ranks
        )
        if scores is None:
            return
        val_seconds = time.perf_counter() - start
        if not math.isfinite(scores.loss):
            self._raise_non_finite("validation")
        self.seconds += val_seconds
        trained = self.tally.total(self.ranks)
        train_loss, train_accuracy = trained.means()
        row = {
            "epoch": self.epoch + 1,
            "step": self.step,
            "lr": self.config.lr * self._lr_factor(self.step - 1),
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "val_loss": scores.loss,
            "val_accuracy": scores.accuracy,
            "tta_accuracy": scores.tta_accuracy,
            "skipped_steps": trained.skipped,
            "images_per_second": trained.images / self.epoch_seconds,
            "train_seconds_per_batch": self.epoch_seconds / self.batch,
            "val_seconds_per_batch": val_seconds / len(self.val_batches),
            "peak_memory_mib": machine.peak_memory_mib(self.device),
            "train_seconds": self.train_seconds,
            "seconds": self.seconds,
        }
        improved = not self.history or scores.accuracy > self.best_accuracy
        self.history.append(row)
        self.epoch += 1
        steps = self.batch
        self.batch, self.epoch_seconds = 0, 0.0
        self.tally.reset()
        if improved and self.ranks.first:
            save_checkpoint(self.folder.best, {**self._identity(), "weights": self.evaluated.state_dict()})
        self.save()
        self.folder.write_metrics(self.history)
        self.folder.write_events(row)
        self.say(report.line(row, *self._columns))
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

    def _stop(self, signum: int) -> None:
        if not all_finite(self.model.parameters()):  # the last step's loss did not show it yet
            self._raise_non_finite("next training")
        self._share_statistics()
        self.save()
        self.folder.write_curves(self.history, self.dataset.label)
        raise Interrupted(
            signum,
            f"stopped by {signal.Signals(signum).name} after step {self.step} of {self.total_steps}; "
            f"go on with `fastres train --resume {self.folder.path}`",
        )

    def _identity(self) -> dict[str, Any]:
        """What `fastres eval` and `predict` need beside the weights."""
        return {
            "model": self.config.model,
            "model_options": self.model_options,
            "options": self.config.to_dict(),
            "classes": list(self.dataset.classes),
            "mean": list(self.dataset.mean),
            "std": list(self.dataset.std),
            "image_size": self.image_size,
            "stored_size": self.dataset.train.images.shape[-1],
            "data": self.dataset.label,
            "epoch": self.epoch,
            "step": self.step,
        }

    def save(self) -> None:
        """Write everything that a resumed run needs to ``last.pt``, atomically."""
        content = {**self._identity(), **self._progress()}
        if self.ranks.first:
            save_checkpoint(self.folder.last, content)

    def _progress(self) -> dict[str, Any]:
        """What a resumed run needs beside `_identity`."""
        tally = self.tally.total(self.ranks)
        return {
            "weights": self.model.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "batch": self.batch,
            "seconds": self.seconds,
            "train_seconds": self.train_seconds,
            "epoch_seconds": self.epoch_seconds,
            "tally": [tally.loss, tally.correct, tally.images, tally.skipped],
            "history": self.history,
        }

    def resume(self) -> None:
        """Take up the state of ``last.pt``, which only the first rank need see; it may be of another number of ranks.

        Raises:
            CheckpointError: when it is missing, damaged, or of another network.
            FastresError: when it was trained on other data.
        """
        at = self.device if self.ranks.count == 1 else "cpu"
        saved = self.ranks.of_first(lambda: load_checkpoint(self.folder.last, at))
        if lacking := {*self._identity(), *self._progress()} - saved.keys():
            raise CheckpointError(
                f"checkpoint {self.folder.last} lacks {sorted(lacking)[0]!r}, so no run can go on from it: "
                "take another one or train again"
            )
        if saved["data"] != self.dataset.label or saved["classes"] != list(self.dataset.classes):
            raise FastresError(
                f"{self.folder.last} was trained on {saved['data']!r}, not on {self.dataset.label!r}: "
                "give the former data with --data"
            )
        sizes = self._identity()
        if differing := [name for name in ("image_size", "stored_size") if saved[name] != sizes[name]]:
            raise FastresError(
                f"{self.folder.last} was trained on images of {saved[differing[0]]} pixels, not {sizes[differing[0]]}: "
                "give the former data with --data"
            )
        load_weights(self.model, saved["weights"], self.folder.last)
        try:
            if self.average is not None:
                self.average.load_state_dict(saved["average"])
            self.optimizer.load_state_dict(saved["optimizer"])
        except ValueError as error:
            raise CheckpointError(f"checkpoint {self.folder.last} has another optimizer's state: {error}") from error
        self.scaler.load_state_dict(saved["scaler"])
        self.epoch, self.step, self.batch = saved["epoch"], saved["step"], saved["batch"]
        for name in ("seconds", "train_seconds", "epoch_seconds"):
            setattr(self, name, saved[name])
        if self.ranks.first:  # the sums of all
            self.tally.restore(*saved["tally"])
        self.history = saved["history"]
