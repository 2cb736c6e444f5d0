"""Recipes by name: the options in which each differs from the defaults."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import Any

from fastres.errors import FastresError
from fastres.train.config import TrainConfig

# Options that published recipes share. Their crops are padded with zeros, here with reflected pixels.
HE_2015 = dict(
    epochs=None,
    steps=64_000,
    batch_size=128,
    lr=0.1,
    momentum=0.9,
    nesterov=False,
    weight_decay=1e-4,
    decoupled=False,
    schedule="step",
    milestones="0.5,0.75",
    decay_factor=0.1,
    warmup=400 / 64_000,
    crop_pad=4,
    flip="random",
)
CUTOUT_2017 = dict(
    epochs=200,
    batch_size=128,
    lr=0.1,
    momentum=0.9,
    nesterov=True,
    weight_decay=5e-4,
    decoupled=False,
    schedule="step",
    milestones="0.3,0.6,0.8",
    decay_factor=0.2,
    warmup=0.0,
    crop_pad=4,
    flip="random",
    cutout=16,
)

# Of the networks for speed-runs of CIFAR-10: docs/training.md says what they are named after, and what they reach.
SPEED_RUN = dict(
    whiten=True,
    batch_size=500,
    optimizer="muon",
    muon_lr=0.3,
    lr=0.4,
    bias_lr=4.0,
    weight_decay=5e-3,
    schedule="triangular",
    warmup=0.2,
    label_smoothing=0.2,
    crop_pad=2,
    tta=True,
    tta_shift=1,
)

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
    # Least time to within 1% of what 30 epochs reach. What each choice is worth: bench/results/ablation*.json.
    "speed": dict(
        model="speed",
        whiten=True,
        epochs=14,
        batch_size=256,
        optimizer="muon",
        muon_lr=0.15,
        lr=0.4,
        weight_decay=5e-3,
        schedule="triangular",
        warmup=0.2,
        label_smoothing=0.1,
        crop_pad=2,
        tta=True,
    ),
    # About the arithmetic of cifar10-airbench's records, 0.29, 1.4 and 3.1 PFLOP, or less: 0.29, 0.87 and 2.9.
    "speed94": dict(model="speed94", epochs=11, **SPEED_RUN),
    "speed95": dict(model="speed95", epochs=15, ema=0.98, cutout=8, **SPEED_RUN),
    "speed96": dict(model="speed96", epochs=28, cutout=8, **SPEED_RUN),
    # DeVries & Taylor 2017, "Improved Regularization of Convolutional Neural Networks with Cutout": ResNet-18 with
    # 95.28% on CIFAR-10, 96.01% with the cutout that is taken here; a fifth of the rate at epochs 60, 120 and 160.
    "resnet18-95": dict(model="resnet18", stem="cifar", **CUTOUT_2017),
    # The same recipe for the deeper network, for which that paper has no figure; ResNet-50 trained with
    # cross-entropy has 95.0% in Khosla et al. 2020, "Supervised Contrastive Learning", table 2.
    "resnet50-95": dict(model="resnet50", stem="cifar", **CUTOUT_2017),
    # He et al. 2015, section 4.2: 93.39% (mean of five; the best 93.57%). The paper warms up at a tenth of the
    # rate for some 400 steps; here it rises linearly over as many.
    "resnet110": dict(model="resnet110", **HE_2015),
    # He et al. 2016, "Identity Mappings in Deep Residual Networks", table 4: 95.08% with batches of 128.
    "preact1001": dict(model="preact_resnet1001", checkpoint_every=18, **HE_2015),
    # torchvision's reference recipe (references/classification/README.md of pytorch/vision: 8 GPUs of 32 images, 90
    # epochs, a tenth of the rate every 30). ResNet50_Weights.IMAGENET1K_V1 is of it: 76.130% on the central 224 pixels
    # of photos resized to 256.
    "imagenet-resnet50": dict(
        model="resnet50",
        stem="imagenet",
        image_size=224,
        center_share=224 / 256,
        crop_scale=0.08,
        crop_pad=0,
        flip="random",
        epochs=90,
        batch_size=256,
        lr=0.1,
        momentum=0.9,
        nesterov=False,
        weight_decay=1e-4,
        decoupled=False,
        schedule="step",
        milestones="0.3333333333,0.6666666666",
        decay_factor=0.1,
        warmup=0.0,
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


# Rates of one optimizer say nothing about those of another.
RATES: dict[str, dict] = {
    # Loshchilov & Hutter 2019, as PyTorch has it by default, with the decay that fine-tuning takes (Liu et al. 2022,
    # "A ConvNet for the 2020s", table 5)
    "adamw": dict(lr=1e-3, weight_decay=0.05),
    # Wightman et al. 2021, "ResNet strikes back", procedure A2, whose batch is 2048
    "lamb": dict(lr=5e-3, weight_decay=0.02),
}


def preset(name: str, **changes: Any) -> TrainConfig:
    """The configuration of a recipe, with other options where they are given.

    Where they change the batch and not ``lr``, that follows in proportion (Goyal et al. 2017, "Accurate, Large
    Minibatch SGD"); ``muon_lr``, of steps whose length does not depend on the gradient's, stays.

    Of an optimizer that the recipe's rates are not for, they are those of `RATES`.

    Raises:
        FastresError: for a name that is not in `PRESETS`.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise FastresError(f"unknown preset {name!r}: {hint}choose from {', '.join(PRESETS)}")
    config = TrainConfig(**PRESETS[name]).check()
    optimizer, batch = changes.get("optimizer"), changes.get("batch_size")
    if optimizer in RATES and optimizer != config.optimizer:
        changes = {**RATES[optimizer], "decoupled": True, **changes}
    elif batch and "lr" not in changes:
        changes["lr"] = config.lr * batch / config.batch_size
    return config.replace(**changes) if changes else config


def rate_note(name: str, config: TrainConfig, given: Collection[str]) -> str | None:
    """A line on what `preset` made of the learning rate of a recipe whose batch was changed; None: nothing."""
    recipe = preset(name)
    if config.optimizer in RATES and config.optimizer != recipe.optimizer:
        if not {"lr", "weight_decay"} - set(given):
            return None
        return (
            f"{config.optimizer} with learning rate {config.lr:g} and weight decay {config.weight_decay:g}, "
            f"not {name}'s, which are {recipe.optimizer}'s; --lr and --weight-decay set others"
        )
    if config.batch_size == recipe.batch_size or "lr" in given:
        return None
    stays = f"; muon's stays at {config.muon_lr:g}" if config.optimizer == "muon" else ""
    return (
        f"learning rate {config.lr:g} for batches of {config.batch_size}, in proportion to {name}'s {recipe.lr:g} for "
        f"{recipe.batch_size}{stays}; --lr sets another"
    )
