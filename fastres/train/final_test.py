"""What the best epoch of a finished run comes to: its mistakes by class, and its accuracy on images that picked
nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastres.data import Augment, Batches
from fastres.data.dataset import Labelled
from fastres.train.confusion import PICTURE as CONFUSION
from fastres.train.confusion import confusion, write_confusion
from fastres.train.evaluate import evaluate
from fastres.train.run_folder import TEST
from fastres.train.samples import FILE as SAMPLES
from fastres.train.samples import picture, predictions, spread
from fastres.train.trained import Trained, load_trained
from fastres.train.trainer import Trainer


def _batches(trainer: Trainer, trained: Trained, split: Labelled) -> Batches:
    return Batches(
        split,
        min(trainer.config.eval_batch_size, len(split)),
        trained.mean,
        trained.std,
        Augment(crop_pad=0, resize=trained.image_size),
        train=False,
        device=trainer.device,
        workers=trainer.config.workers,
    )


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def final_test(trainer: Trainer) -> list[str]:
    """Evaluate ``best.pt`` on the test images, write the confusion matrix to the run folder, some predictions, and tell
    in a line or two.

    Where validation images of their own picked the epoch, ``test.json`` has the scores. Only the first rank does it.
    """
    dataset, config, folder = trainer.dataset, trainer.config, trainer.folder
    if not trainer.ranks.first or not folder.best.exists():
        return []
    trained = load_trained(folder.best, trainer.device)
    batches = _batches(trainer, trained, dataset.test)
    found = confusion(trained.model, batches, len(dataset.classes), trainer.dtype)
    write_confusion(folder.path, found, list(dataset.classes), f"{dataset.label}, epoch {trained.epoch}")
    samples = predictions(
        trained.model, _batches(trainer, trained, dataset.test.subset(spread(len(dataset.test)))), trainer.dtype
    )
    folder.write_file(SAMPLES, picture(samples, list(dataset.classes), f"{dataset.label}, epoch {trained.epoch}"))
    for tag, name in (("confusion", CONFUSION), ("predictions", SAMPLES)):
        folder.write_picture(f"{tag}/best", _pixels(folder.path / name), trainer.step)
    lines = [f"epoch {trained.epoch}, by class: {found.line(list(dataset.classes))}"]
    if dataset.val is not None:
        scores = evaluate(trained.model, batches, trainer.dtype, config.views)
        row: dict[str, Any] = {
            "epoch": trained.epoch,
            "images": len(dataset.test),
            "loss": scores.loss,
            "accuracy": scores.accuracy,
        }
        row |= {"tta_accuracy": scores.tta_accuracy, "top5": found.top5}
        folder.write_file(TEST, json.dumps(row).encode())
        lines.append(
            f"test accuracy {scores.accuracy:.2%} of epoch {trained.epoch}, the best by validation, on "
            f"{len(dataset.test)} images that picked nothing"
        )
    return lines
