"""Trained networks from disk, for evaluation and prediction."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastres.data.dataset import first_line
from fastres.errors import FastresError
from fastres.models import create_model
from fastres.nn import fold
from fastres.train.checkpoint import CheckpointError, load_checkpoint, load_weights
from fastres.train.content import NETWORK, RUN, check_content
from fastres.train.machine import pick_backend


@dataclass(frozen=True)
class Trained:
    """A network in evaluation mode with what its inputs and outputs mean.

    ``mean`` and ``std`` are per channel on the scale 0..255 of the pixels; ``data`` labels its training images, which
    were decoded to ``stored_size`` pixels a side and brought to ``image_size``, which the network sees; of a photo's
    shorter side it sees the part ``center_share``. ``averaged``: the weights are the average of a run with ``--ema``,
    which is what its accuracies are of.
    """

    model: nn.Module
    path: Path
    classes: list[str]
    mean: list[float]
    std: list[float]
    image_size: int
    stored_size: int
    data: str
    epoch: int
    options: dict[str, Any]
    averaged: bool = False
    center_share: float = 1.0


def find_checkpoint(path: str | os.PathLike | None) -> Path:
    """``path`` itself if it is a file, a run folder's ``best.pt``, or for None the newest run's under ``runs/``.

    Raises:
        CheckpointError: when there is none.
    """
    if path is None:
        found = [file for file in Path("runs").glob("*/best.pt") if file.is_file()]
        runs = sorted(found, key=lambda file: file.stat().st_mtime)
        if not runs:
            raise CheckpointError("no finished run under runs/: name a run folder or checkpoint with --run")
        return runs[-1]
    path = Path(path)
    return path / "best.pt" if path.is_dir() else path


def load_trained(path: Path, device: torch.device) -> Trained:
    """Load a network that `fastres train` saved.

    Raises:
        CheckpointError: when the file is missing, damaged, or its weights do not fit the network it names.
    """
    saved = load_checkpoint(path, device)
    check_content(saved, NETWORK, path, "no network can be made of it")
    try:
        model = create_model(saved["model"], num_classes=len(saved["classes"]), **saved["model_options"])
    except (FastresError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path} is of no network that is known here ({first_line(error)})") from error
    weights, averaged = evaluated_weights(saved)
    load_weights(model, weights, path)
    model = model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    if pick_backend("auto", device) == "fused":
        model = fold(model)
    facts = {name: saved[name] for name in ("classes", "mean", "std", "image_size", "data", "epoch", "options")}
    facts["stored_size"] = saved.get("stored_size", saved["image_size"])
    facts["center_share"] = center_share(saved, path)
    return Trained(model, path, **facts, averaged=averaged)


def center_share(saved: dict[str, Any], path: Path) -> float:
    """Part of a photo's shorter side that a checkpoint's network saw; early checkpoints have it among the options.

    Raises:
        CheckpointError: for what is no share.
    """
    share = saved.get("center_share", saved["options"].get("center_share"))
    if share is None:
        return 1.0
    if type(share) not in (int, float) or not 0 < share <= 1:
        raise CheckpointError(f"checkpoint {path} has no right value of 'center_share': take another one")
    return float(share)


def evaluated_weights(saved: dict[str, Any]) -> tuple[dict[str, torch.Tensor], bool]:
    """The weights that a checkpoint's accuracies are of, and whether they are an average: ``best.pt`` has no others."""
    average = saved.get("average")
    if average is not None and not RUN["average"](average):
        raise CheckpointError("the checkpoint's weight average is none: take another one or train again")
    if average is not None and average["started"]:
        return average["weights"], True
    options = saved.get("options")
    return saved["weights"], "average" not in saved and isinstance(options, dict) and options.get("ema") is not None
