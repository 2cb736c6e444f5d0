"""Loss and accuracy of a network on a split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.data import Batches
from fastres.train.machine import autocast


@dataclass
class Tally:
    """Sums over batches that stay on the device, so that adding to them never waits for it."""

    loss: Tensor
    correct: Tensor
    images: int = 0

    @classmethod
    def zero(cls, device: torch.device) -> Tally:
        """An empty tally."""
        return cls(
            torch.zeros((), dtype=torch.float64, device=device), torch.zeros((), dtype=torch.int64, device=device)
        )

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: ``loss`` is its mean, ``logits`` [B, classes], ``labels`` [B]."""
        self.loss += loss.detach() * len(labels)
        self.correct += (logits.detach().argmax(1) == labels).sum()
        self.images += len(labels)

    def means(self) -> tuple[float, float]:
        """(mean loss, accuracy in [0, 1]); waits for the device."""
        return self.loss.item() / self.images, self.correct.item() / self.images


def predict_logits(model: nn.Module, images: Tensor, tta: bool) -> Tensor:
    """Logits [B, classes] in fp32; with ``tta`` the mean over each image and its mirror image."""
    logits = model(images).float()
    return (logits + model(images.flip(3)).float()) / 2 if tta else logits


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Batches,
    dtype: torch.dtype,
    tta: bool,
    stopped: Callable[[], bool] = lambda: False,
) -> tuple[float, float] | None:
    """(mean cross-entropy, accuracy) with running statistics, in evaluation mode; the model's mode is restored.

    Args:
        tta: see `predict_logits`.
        stopped: asked after each batch whether to give up; the result is then None.
    """
    device = next(model.parameters()).device
    tally, training = Tally.zero(device), model.training
    model.eval()
    with autocast(device, dtype):
        for images, labels in batches.epoch(0):
            logits = predict_logits(model, images, tta)
            tally.add(F.cross_entropy(logits, labels), logits, labels)
            if stopped():
                break
    model.train(training)
    return None if stopped() else tally.means()
