"""The accuracy of a finished run on images that picked nothing: neither the best epoch nor any option."""

from __future__ import annotations

import json

from fastres.atomic import atomic_write
from fastres.data import Augment, Batches
from fastres.train.evaluate import evaluate
from fastres.train.run_folder import TEST
from fastres.train.trained import load_trained
from fastres.train.trainer import Trainer


def final_test(trainer: Trainer) -> str | None:
    """Evaluate ``best.pt``, which validation images picked, on the test images; write ``test.json`` and tell in a line.

    None where the data have no images for that alone, or on another rank than the first.
    """
    dataset, config = trainer.dataset, trainer.config
    if dataset.val is None or not trainer.ranks.first:
        return None
    trained = load_trained(trainer.folder.best, trainer.device)
    batches = Batches(
        dataset.test,
        min(config.eval_batch_size, len(dataset.test)),
        trained.mean,
        trained.std,
        Augment(crop_pad=0, resize=trained.image_size),
        train=False,
        device=trainer.device,
    )
    scores = evaluate(trained.model, batches, trainer.dtype, config.tta)
    row = {"epoch": trained.epoch, "images": len(dataset.test), "loss": scores.loss, "accuracy": scores.accuracy}
    with atomic_write(trainer.folder.path / TEST) as file:
        file.write(json.dumps({**row, "tta_accuracy": scores.tta_accuracy}).encode())
    return (
        f"test accuracy {scores.accuracy:.2%} of epoch {trained.epoch}, the best by validation, on {len(dataset.test)} images "
        "that picked nothing"
    )
