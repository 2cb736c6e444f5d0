"""The training loop: one object that holds a run's whole state and can save, resume and finish it."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from fastres.data import Augment, Batches, Dataset
from fastres.errors import FastresError
from fastres.models.fused import create_fused_model
from fastres.models.registry import accepted_options, create_model
from fastres.train import machine, report
from fastres.train.checkpoint import CheckpointError, load_checkpoint, load_weights, save_checkpoint
from fastres.train.config import TrainConfig
from fastres.train.evaluate import Tally, evaluate
from fastres.train.optimizer import make_optimizer, set_lr
from fastres.train.run_folder import RunFolder
from fastres.train.schedule import lr_factor
from fastres.train.signals import StopRequest


class NonFiniteLoss(FastresError):
    """The loss became NaN or infinite; the last good checkpoint is left as it was."""


class Interrupted(Exception):
    """SIGINT or SIGTERM ended the run after its state was saved."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


def model_options(config: TrainConfig, image_size: int) -> dict[str, Any]:
    """The constructor's options that the configuration asks for, for images of this many pixels."""
    options: dict[str, Any] = {}
    if config.stem != "auto":
        options["stem"] = config.stem
    elif "stem" in accepted_options(config.model):
        options["stem"] = "cifar" if image_size <= 64 else "imagenet"
    if config.checkpoint_every:
        options["checkpoint_every"] = config.checkpoint_every
    return options


class Trainer:
    """Trains one network on one dataset and keeps its run folder.

    Every random choice is a function of (seed, epoch, step), and `save` stores all that is summed up over steps,
    so a resumed run goes on bit for bit.

    Args:
        config: checked options.
        dataset: images and labels, see `fastres.data.load`.
        folder: where checkpoints and metrics go.
        say: prints one line.

    Raises:
        FastresError: when the options do not fit the data or the machine.
    """

    def __init__(
        self, config: TrainConfig, dataset: Dataset, folder: RunFolder, say: Callable[[str], None] = tqdm.write
    ):
        self.config, self.dataset, self.folder, self.say = config, dataset, folder, say
        self.device = machine.pick_device(config.device)
        self.dtype = machine.pick_dtype(config.precision, self.device)
        if config.deterministic:
            machine.make_deterministic()
        if config.compile:
            machine.check_compile(self.device)

        augment = Augment(config.crop_pad, config.flip, config.cutout, config.image_size)
        common = dict(mean=dataset.mean, std=dataset.std, seed=config.seed, device=self.device)
        self.train_batches = Batches(dataset.train, config.batch_size, augment=augment, train=True, **common)
        self.val_batches = Batches(
            dataset.test, min(config.eval_batch_size, len(dataset.test)), augment=augment, train=False, **common
        )
        self.total_steps = config.steps or config.epochs * len(self.train_batches)

        torch.manual_seed(config.seed)
        size = config.image_size or dataset.train.images.shape[-1]
        self.model_options = model_options(config, size)
        self.backend = machine.pick_backend(config.backend, self.device)
        create = {"fused": create_fused_model, "eager": create_model}[self.backend]
        model = create(config.model, num_classes=len(dataset.classes), **self.model_options)
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model = model.to(self.device, memory_format=layout)
        self.network = torch.compile(self.model) if config.compile else self.model
        self.average = (
            AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
            if config.ema is not None
            else None
        )
        scaled = self.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        self.optimizer = make_optimizer(
            self.model, config.lr, config.momentum, config.nesterov, config.weight_decay, scaled
        )

        self.step = self.epoch = self.batch = 0  # batch: steps done in the current epoch
        self.seconds = self.epoch_seconds = 0.0
        self.tally = Tally.zero(self.device)
        self.history: list[dict[str, Any]] = []

    @property
    def evaluated(self) -> torch.nn.Module:
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
            Interrupted: after a SIGINT or SIGTERM, with the state saved.
        """
        self.say(report.heading())
        for row in self.history:
            self.say(report.line(row))
        if self.history:
            self.folder.write_metrics(self.history)  # a process that was killed may have saved a row only in last.pt
        with StopRequest() as stop:
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
            total=last, initial=self.batch, desc=f"epoch {self.epoch + 1}", unit="batch", leave=False, disable=None
        )
        start = time.perf_counter()
        with bar:
            for images, labels in self.train_batches.epoch(self.epoch, start_step=self.batch):
                self.train_step(images, labels)
                bar.update()
                if stop.signum is not None or self._epoch_is_over():
                    break
        self.check_finite()  # waits for the device, so that the time below is the work's
        elapsed = time.perf_counter() - start
        self.seconds += elapsed
        self.epoch_seconds += elapsed

    def train_step(self, images: Tensor, labels: Tensor) -> None:
        """One optimizer step on images [B, 3, H, W] and labels int64 [B]; on a CPU it raises `NonFiniteLoss`."""
        config = self.config
        set_lr(self.optimizer, self._lr(self.step))
        for part, part_labels in zip(images.chunk(config.accumulate), labels.chunk(config.accumulate)):
            with machine.autocast(self.device, self.dtype):
                logits = self.network(part)
            loss = F.cross_entropy(logits.float(), part_labels, label_smoothing=config.label_smoothing)
            self.scaler.scale(loss / config.accumulate).backward()
            self.tally.add(loss, logits, part_labels)
        if self.device.type == "cpu":
            self.check_finite()  # free here; on a GPU it would stall every step, so there it waits for the epoch
        if config.clip is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.step += 1
        self.batch += 1

    def _lr(self, step: int) -> float:
        config = self.config
        return config.lr * lr_factor(config.schedule, step, self.total_steps, config.warmup)

    def check_finite(self) -> None:
        """Wait for the device and raise `NonFiniteLoss` if the epoch's loss so far is not finite."""
        if not math.isfinite(self.tally.loss.item()):
            self._raise_non_finite("training")

    def _raise_non_finite(self, which: str) -> None:
        kept = f"{self.folder.last} is the last good checkpoint" if self.folder.last.exists() else "no checkpoint yet"
        raise NonFiniteLoss(
            f"the {which} loss is NaN or infinite in epoch {self.epoch + 1}, step {self.step + 1}: lower --lr "
            f"(now {self.config.lr}) or set --clip; {kept}"
        )

    def _end_epoch(self, stop: StopRequest) -> None:
        """Validate, save and report; a stop request in the validation leaves it to the resumed run."""
        start = time.perf_counter()
        result = evaluate(
            self.evaluated, self.val_batches, self.dtype, self.config.tta, lambda: stop.signum is not None
        )
        if result is None:
            return
        val_loss, val_accuracy = result
        val_seconds = time.perf_counter() - start
        if not math.isfinite(val_loss):
            self._raise_non_finite("validation")
        self.seconds += val_seconds
        train_loss, train_accuracy = self.tally.means()
        row = {
            "epoch": self.epoch + 1,
            "step": self.step,
            "lr": self._lr(self.step - 1),
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "val_loss": val_loss,
            "val_accuracy": val_accuracy,
            "images_per_second": self.tally.images / self.epoch_seconds,
            "train_seconds_per_batch": self.epoch_seconds / self.batch,
            "val_seconds_per_batch": val_seconds / len(self.val_batches),
            "peak_memory_mib": machine.peak_memory_mib(self.device),
            "seconds": self.seconds,
        }
        improved = not self.history or val_accuracy > self.best_accuracy
        self.history.append(row)
        self.epoch += 1
        self.batch, self.epoch_seconds, self.tally = 0, 0.0, Tally.zero(self.device)
        if improved:
            save_checkpoint(self.folder.best, {**self._identity(), "weights": self.evaluated.state_dict()})
        self.save()
        self.folder.write_metrics(self.history)
        self.folder.write_events(row)
        self.say(report.line(row))

    def _stop(self, signum: int) -> None:
        if not all(p.isfinite().all() for p in self.model.parameters()):  # the last step's loss did not show it yet
            self._raise_non_finite("next training")
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
            "image_size": self.config.image_size or self.dataset.train.images.shape[-1],
            "data": self.dataset.label,
            "epoch": self.epoch,
            "step": self.step,
        }

    def save(self) -> None:
        """Write everything that a resumed run needs to ``last.pt``, atomically."""
        save_checkpoint(self.folder.last, {**self._identity(), **self._progress()})

    def _progress(self) -> dict[str, Any]:
        """What a resumed run needs beside `_identity`."""
        return {
            "weights": self.model.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "batch": self.batch,
            "seconds": self.seconds,
            "epoch_seconds": self.epoch_seconds,
            "tally": [self.tally.loss, self.tally.correct, self.tally.images],
            "history": self.history,
        }

    def resume(self) -> None:
        """Take up the state of ``last.pt``.

        Raises:
            CheckpointError: when it is missing, damaged, or of another network.
            FastresError: when it was trained on other data.
        """
        saved = load_checkpoint(self.folder.last, self.device)
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
        load_weights(self.model, saved["weights"], self.folder.last)
        if self.average is not None:
            self.average.load_state_dict(saved["average"])
        try:
            self.optimizer.load_state_dict(saved["optimizer"])
        except ValueError as error:
            raise CheckpointError(f"checkpoint {self.folder.last} has another optimizer's state: {error}") from error
        self.scaler.load_state_dict(saved["scaler"])
        self.epoch, self.step, self.batch = saved["epoch"], saved["step"], saved["batch"]
        self.seconds, self.epoch_seconds = saved["seconds"], saved["epoch_seconds"]
        self.tally = Tally(*saved["tally"])
        self.history = saved["history"]
