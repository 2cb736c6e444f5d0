"""One optimizer update from a batch, also as a CUDA graph: nothing in it waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastres.train import graph
from fastres.train.average import WeightAverage
from fastres.train.evaluate import Tally
from fastres.train.loss import cross_entropy
from fastres.train.machine import autocast, on_device


@dataclass
class Update:
    """Forward, loss, backward and optimizer step at the optimizer's present learning rates.

    Args:
        network: called with images; may be a compiled or a distributed wrapper of the network.
        parameters: those whose gradient ``clip`` limits.
        optimizer: counts its steps, see `fastres.train.optimizer.SGDW`: those that the scaler skips it does not take.
        tally: what each batch's loss and hits are added to, on the device, and on the host the skipped steps.
        accumulate: parts that a batch is split into, one after the other.
        without_exchange: context for all parts but the last, whose gradients other ranks need not have.
        clip: largest norm of the whole gradient; None: any.
        average: follows the network, if there is one.
    """

    network: Callable[[Tensor], Tensor]
    parameters: list[nn.Parameter]
    optimizer: Any
    scaler: torch.amp.GradScaler
    tally: Tally
    dtype: torch.dtype
    label_smoothing: float = 0.0
    class_weights: Tensor | None = None
    accumulate: int = 1
    without_exchange: Callable[[], AbstractContextManager] = nullcontext
    clip: float | None = None
    average: WeightAverage | None = None

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        """Learn from images [B, 3, H, W] and labels int64 [B], or the classes' shares [B, classes]."""
        self.optimizer.zero_grad(set_to_none=True)
        *parts, last = zip(images.chunk(self.accumulate), labels.chunk(self.accumulate))
        if parts:
            with self.without_exchange():
                for part in parts:
                    self._accumulate(*part)
        self._accumulate(*last)
        if self.clip is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        taken = self.optimizer.taken
        self.scaler.step(self.optimizer)
        self.tally.skipped += self.optimizer.taken == taken
        self.scaler.update()
        if self.average is not None:
            self.average.update()

    def _accumulate(self, images: Tensor, labels: Tensor) -> None:
        """Add a part's gradients, and its loss and hits to the tally."""
        with autocast(images.device, self.dtype):
            logits = self.network(images)
        loss = cross_entropy(logits.float(), labels, self.label_smoothing, self.class_weights)
        self.scaler.scale(loss / self.accumulate).backward()
        self.tally.add(loss, logits, labels)


class GraphedUpdate:
    """An `Update` that is recorded as one CUDA graph for each shape of batch and replayed from then on.

    The first `graph.WARMUP` batches of a shape are learnt from without a graph. The learning rates must be tensors on
    the device. Counting the images is left to the host: a replay is one launch.
    """

    def __init__(self, update: Update):
        self.update = update
        self._stream: torch.cuda.Stream | None = None
        self._seen: dict[torch.Size, int] = {}
        self._recorded: dict[torch.Size, tuple[Callable[[], None], Tensor, Tensor]] = {}

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        """See `Update`."""
        with on_device(images.device):
            self._learn(images, labels)

    def _learn(self, images: Tensor, labels: Tensor) -> None:
        shape = images.shape
        self._seen[shape] = self._seen.get(shape, 0) + 1
        if self._stream is None:
            self._stream = graph.side_stream(images.device)
        if self._seen[shape] <= graph.WARMUP:
            with graph.aside(self._stream):
                self.update(images, labels)
            return
        if shape not in self._recorded:
            self._recorded[shape] = self._record(images, labels, self._stream)
        replay, static_images, static_labels = self._recorded[shape]
        static_images.copy_(images)
        static_labels.copy_(labels)
        replay()
        self.update.tally.images += len(labels)

    def _record(
        self, images: Tensor, labels: Tensor, stream: torch.cuda.Stream
    ) -> tuple[Callable[[], None], Tensor, Tensor]:
        static = images.clone(memory_format=torch.preserve_format), labels.clone()
        self.update.optimizer.zero_grad(set_to_none=True)  # so that the graph makes gradients in its own memory
        counted = self.update.tally.images
        replay, _ = graph.record(lambda: self.update(*static), stream)
        self.update.tally.images = counted  # recording learns nothing
        return replay, *static
