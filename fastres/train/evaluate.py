"""Loss and accuracy of a network on a split."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.atomic import warn_once
from fastres.data import Batches
from fastres.data.dataset import first_line
from fastres.errors import FastresError
from fastres.train.distributed import ALONE, Ranks
from fastres.train.machine import autocast, on_device
from fastres.train.memory import is_out_of_memory, release_memory
from fastres.train.views import Views


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
        """Add a batch: ``loss`` is its mean, ``logits`` [B, classes], ``labels`` [B], or the classes' shares
        [B, classes]: of a mixed image the class of the largest share counts.
        """
        labels = labels.argmax(1) if labels.ndim == 2 else labels
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
        """The sums over all ranks, in one exchange; alone the tally itself. The skipped steps are those of all
        together.
        """
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


def predict_logits(model: nn.Module, images: Tensor, views: Views | None) -> Tensor:
    """Logits [B, classes] in fp32; with ``views`` the mean over them."""
    logits = model(images).float()
    return logits if views is None else views.mean_logits(model, images, logits)


@dataclass(frozen=True)
class Scores:
    """Mean cross-entropy and accuracy in [0, 1] of single images; ``tta_accuracy`` is that of the mean logits over
    `Views` of each image, None where it was not asked for."""

    loss: float
    accuracy: float
    tta_accuracy: float | None = None


@overload
def evaluate(
    model: nn.Module,
    batches: Batches,
    dtype: torch.dtype,
    views: Views | None,
    *,
    ranks: Ranks = ALONE,
    say: Callable[[str], None] = ...,
) -> Scores: ...


@overload
def evaluate(
    model: nn.Module,
    batches: Batches,
    dtype: torch.dtype,
    views: Views | None,
    stopped: Callable[[], bool],
    ranks: Ranks = ALONE,
    say: Callable[[str], None] = ...,
) -> Scores | None: ...


def evaluate(
    model: nn.Module,
    batches: Batches,
    dtype: torch.dtype,
    views: Views | None,
    stopped: Callable[[], bool] = lambda: False,
    ranks: Ranks = ALONE,
    say: Callable[[str], None] = warn_once,
) -> Scores | None:
    """Scores with running statistics, in evaluation mode; the model's mode is restored.

    Batches that do not fit into memory become smaller, for good.

    Args:
        views: also score the mean over these, which takes a forward for each.
        stopped: asked after each batch whether to give up; the result is then None.
        ranks: each of them has a share of the batches.
        say: hears of smaller batches.

    Raises:
        FastresError: where memory is too small for an image.
    """
    training = model.training
    model.eval()
    try:
        while True:
            found, reason = None, "memory was short on another rank"
            try:
                found = _tallies(model, batches, dtype, views, stopped)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = first_line(error)
            if not ranks.any(found is None):
                break
            _shrink(batches, reason, say)
    finally:
        model.train(training)
    if found is None or stopped():
        return None
    plain, averaged = found
    return Scores(*plain.total(ranks).means(), averaged.total(ranks).means()[1] if views is not None else None)


def _shrink(batches: Batches, reason: str, say: Callable[[str], None]) -> None:
    size = batches.batch_size
    if size == 1:
        raise FastresError(
            f"not one image fits into memory in the validation ({reason}): give it more memory, or lower --image-size"
        )
    batches.batch_size = -(-size // 2)
    release_memory(batches.device)
    say(f"validation batches of {size} images do not fit into memory ({reason}): taking {batches.batch_size}")


@torch.inference_mode()
def _tallies(
    model: nn.Module, batches: Batches, dtype: torch.dtype, views: Views | None, stopped: Callable[[], bool]
) -> tuple[Tally, Tally]:
    """Sums over single images, and over the mean logits of each image's views."""
    device = next(model.parameters()).device
    plain, averaged = Tally.zero(device), Tally.zero(device)
    with on_device(device), autocast(device, dtype):
        for images, labels in batches.epoch(0):
            logits = model(images).float()
            loss = F.cross_entropy(logits, labels)
            plain.add(loss, logits, labels)
            if views is not None:
                averaged.add(loss, views.mean_logits(model, images, logits), labels)
            if stopped():
                break
    return plain, averaged
