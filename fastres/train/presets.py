"""Recipes by name: the options in which each differs from the defaults."""

from __future__ import annotations

import difflib

from fastres.errors import FastresError
from fastres.train.config import TrainConfig

PRESETS: dict[str, dict] = {
    # The quickest good one on whatever machine there is: minutes on two CPU cores.
    "fast": dict(
        model="resnet8",
        epochs=6,
        crop_pad=2,  # a run this short does not overfit: less to learn than with the usual 4
        batch_size=256,
        lr=0.4,
        weight_decay=5e-3,
        schedule="triangular",
        warmup=0.2,
        label_smoothing=0.1,
        tta=True,
    ),
    # The TensorFlow-slim notebook: plain momentum SGD at one rate, no augmentation, no decay, fp32.
    "notebook": dict(
        model="notebook",
        image_size=96,
        batch_size=64,
        eval_batch_size=100,  # images of 96x96 take memory
        steps=20_000,
        epochs=None,
        lr=0.01,
        momentum=0.9,
        nesterov=False,
        weight_decay=0.0,
        schedule="constant",
        warmup=0.0,
        crop_pad=0,
        flip="none",
        precision="fp32",
    ),
}


def preset(name: str) -> TrainConfig:
    """The configuration of a recipe.

    Raises:
        FastresError: for a name that is not in `PRESETS`.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise FastresError(f"unknown preset {name!r}: {hint}choose from {', '.join(PRESETS)}")
    return TrainConfig(**PRESETS[name]).check()
