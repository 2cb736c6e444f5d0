"""Loss and accuracy of a network on a split."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.data import Batches
from fastres.train.distributed import ALONE, Ranks
from fastres.train.machine import autocast, on_device


@dataclass
class Tally:
    """Sums over batches that stay on the device, so that adding to them never waits for it.

    ``images`` and ``skipped``, the optimizer steps that fp16's gradient scaler left out, the host knows.
    """

    loss: Tensor
    correct: Tensor
    images: int = 0
    skipped: int = 0

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

    def reset(self) -> None:
        """Back to zero, in the same tensors."""
        self.loss.zero_()
        self.correct.zero_()
        self.images = self.skipped = 0

    def restore(self, loss: Tensor, correct: Tensor, images: int, skipped: int = 0) -> None:
        """Take up saved sums, in the same tensors."""
        self.loss.copy_(loss)
        self.correct.copy_(correct)
        self.images, self.skipped = images, skipped

    def total(self, ranks: Ranks) -> Tally:
        """The sums over all ranks, in one exchange; alone the tally itself. The skipped steps are those of all together."""
        if ranks.count == 1:
            return self
        counted = self.loss.new_tensor([self.images, self.skipped if ranks.first else 0])
        sums = ranks.total(torch.cat([torch.stack([self.loss, self.correct.double()]), counted]))
        loss, correct, images, skipped = sums.unbind()
        return Tally(loss, correct.long(), int(images), int(skipped))

    def means(self) -> tuple[float, float]:
        """(mean loss, accuracy in [0, 1]); waits for the device."""
        return self.loss.item() / self.images, self.correct.item() / self.images


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no tensor holds a NaN or an infinity: one reduction of each, and one wait for the device."""
    return bool(torch.stack(torch._foreach_norm(list(tensors), float("inf"))).isfinite().all())


def predict_logits(model: nn.Module, images: Tensor, tta: bool) -> Tensor:
    """Logits [B, classes] in fp32; with ``tta`` the mean over each image and its mirror image."""
    logits = model(images).float()
    return (logits + model(images.flip(3)).float()) / 2 if tta else logits


@dataclass(frozen=True)
class Scores:
    """Mean cross-entropy and accuracy in [0, 1] of single images; ``tta_accuracy`` is that of the mean logits over
    each image and its mirror image, None where it was not asked for."""

    loss: float
    accuracy: float
    tta_accuracy: float | None = None


@overload
def evaluate(
    model: nn.Module, batches: Batches, dtype: torch.dtype, tta: bool, *, ranks: Ranks = ALONE
) -> Scores: ...


@overload
def evaluate(
    model: nn.Module,
    batches: Batches,
    dtype: torch.dtype,
    tta: bool,
    stopped: Callable[[], bool],
    ranks: Ranks = ALONE,
) -> Scores | None: ...


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Batches,
    dtype: torch.dtype,
    tta: bool,
    stopped: Callable[[], bool] = lambda: False,
    ranks: Ranks = ALONE,
) -> Scores | None:
    """Scores with running statistics, in evaluation mode; the model's mode is restored.

    Args:
        tta: whether to score the mean over mirror images too, which takes a second forward.
        stopped: asked after each batch whether to give up; the result is then None.
        ranks: each of them has a share of the batches.
    """
    device = next(model.parameters()).device
    plain, averaged, training = Tally.zero(device), Tally.zero(device), model.training
    model.eval()
    with on_device(device), autocast(device, dtype):
        for images, labels in batches.epoch(0):
            logits = model(images).float()
            loss = F.cross_entropy(logits, labels)
            plain.add(loss, logits, labels)
            if tta:
                averaged.add(loss, logits + model(images.flip(3)).float(), labels)
            if stopped():
                break
    model.train(training)
    if stopped():
        return None
    return Scores(*plain.total(ranks).means(), averaged.total(ranks).means()[1] if tta else None)
