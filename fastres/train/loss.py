"""The training loss."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

CLASS_WEIGHTS = ("none", "balanced")


def balanced_weights(labels: Tensor, classes: int) -> Tensor:
    """A weight for each class, fp32 [classes]: inverse to its number of images, 1 in the mean over all images.

    Args:
        labels: int64 [N], of the training images.
    """
    counts = labels.bincount(minlength=classes).double()
    return (len(labels) / (counts.count_nonzero() * counts.clamp(min=1))).float()


def cross_entropy(
    logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, weights: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy of logits [B, classes].

    Args:
        labels: int64 [B], or the classes' shares, float [B, classes]; smoothing takes its part of either.
        weights: of classes. The mean is over images, not over their weights, so that batches in parts, and those of
            several ranks, have the gradient of the whole.
    """
    if weights is None:
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    return F.cross_entropy(logits, labels, weights, label_smoothing=label_smoothing, reduction="none").mean()
