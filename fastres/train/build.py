"""From a configuration to the network, the optimizer and the batches that a run starts with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastres.data import Augment, Batches, DataError, Dataset
from fastres.data.budget import memory_budget, square_bytes
from fastres.errors import FastresError
from fastres.models.fused import create_fused_model
from fastres.models.registry import accepted_options, create_model
from fastres.train import machine
from fastres.train.config import TrainConfig, parse_betas, parse_channels
from fastres.train.distributed import ALONE, Ranks
from fastres.train.layers import depths
from fastres.train.optimizer import Optimizer, make_optimizer
from fastres.train.progressive import parse_progressive
from fastres.train.whiten import whiten

AUGMENTS = ("crop_scale", "color_jitter", "auto_augment", "magnitude", "random_erasing", "mixup", "cutmix")


def image_size(config: TrainConfig, dataset: Dataset) -> int:
    """Pixels a side of the images that the network sees in the end.

    Raises:
        DataError: where the data were decoded to be seen at another size than the configuration asks for.
    """
    if config.image_size and dataset.image_size not in (None, config.image_size):
        raise DataError(
            f"{dataset.label} was loaded for {dataset.image_size} pixels, but --image-size is {config.image_size}: "
            f"load it with image_size={config.image_size}, or leave --image-size out"
        )
    return config.image_size or dataset.image_size or dataset.train.size[-1]


def check_center_share(config: TrainConfig, dataset: Dataset) -> None:
    """Refuse photos that were loaded with another share of them than the configuration asks for.

    Raises:
        DataError: names both.
    """
    wanted, found = config.center_share, dataset.center_share
    if None not in (wanted, found) and wanted != found:
        raise DataError(
            f"{dataset.label} was loaded with a share of {found:g} of each photo, but --center-share is {wanted:g}: "
            f"load it with center_share={wanted:g}, or set center_share to {found:g}"
        )


def model_options(config: TrainConfig, size: int) -> dict[str, Any]:
    """The constructor's options that the configuration asks for, for images of ``size`` pixels."""
    options: dict[str, Any] = {}
    if config.stem != "auto":
        options["stem"] = config.stem
    elif "stem" in accepted_options(config.model):
        options["stem"] = "cifar" if size <= 64 else "imagenet"
    if config.checkpoint_every:
        options["checkpoint_every"] = config.checkpoint_every
    return options


def with_statistics(config: TrainConfig, dataset: Dataset) -> Dataset:
    """The dataset with the mean and standard deviation that are asked for, in place of its training images'."""
    if config.mean is None or config.std is None:
        return dataset
    mean, std = (
        tuple(255 * value for value in parse_channels(name, text))
        for name, text in (("mean", config.mean), ("std", config.std))
    )
    return dataclasses.replace(dataset, mean=mean, std=std)


def build_model(
    config: TrainConfig,
    dataset: Dataset,
    device: torch.device,
    prepare: Callable[[nn.Module], None] = lambda model: None,
) -> nn.Module:
    """The network with the seed's initial weights, on its device and in its memory format.

    Args:
        prepare: what is done to it before it goes to its device.

    Raises:
        FastresError: for options that the network does not have, or that only fused blocks have.
    """
    backend = machine.pick_backend(config.backend, device)
    create = {"fused": create_fused_model, "eager": create_model}[backend]
    options = model_options(config, image_size(config, dataset))
    if config.recompute:
        if backend != "fused":
            raise FastresError("--recompute is of fused blocks: add --backend fused, or --checkpoint-every 1")
        options["recompute"] = True
    with machine.initial_weights(config.seed):
        model = create(config.model, num_classes=len(dataset.classes), **options)
        if config.whiten:
            whiten(model, dataset)
        prepare(model)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    return model.to(device, memory_format=layout)  # type: ignore[call-overload]


def build_batches(
    config: TrainConfig, dataset: Dataset, device: torch.device, ranks: Ranks = ALONE
) -> tuple[Batches, Batches]:
    """Training and validation batches, of which each rank has a part.

    Raises:
        DataError: for sizes that do not fit the images or the number of ranks.
    """
    parts = ranks.count * config.accumulate
    if config.batch_size % parts:
        raise DataError(
            f"--batch-size {config.batch_size} does not split over {ranks.count} ranks in --accumulate "
            f"{config.accumulate} equal parts: make it a multiple of {parts}"
        )
    if config.batch_size == parts and ranks.count > 1 and not config.sync_bn:
        raise DataError(
            f"--batch-size {config.batch_size} leaves each of {ranks.count} ranks one image, of which BatchNorm has no "
            "statistics: make it larger or add --sync-bn"
        )
    size = image_size(config, dataset)
    if config.progressive:
        for smaller, _ in parse_progressive(config.progressive):
            if smaller > size:
                raise DataError(f"--progressive {config.progressive}: {smaller} exceeds the images' {size} pixels")
    augment = Augment(
        config.crop_pad if config.crop_scale is None else 0,
        config.flip,
        config.cutout,
        config.image_size or dataset.image_size,
        **{name: getattr(config, name) for name in AUGMENTS},
    )
    validation = dataset.validation
    needed = sum(square_bytes(len(split), split.size[0]) for split in (dataset.train, validation))
    resident = device.type == "cpu" or needed <= memory_budget(config.memory_budget, device).bytes
    common: dict[str, Any] = dict(
        mean=dataset.mean, std=dataset.std, augment=augment, seed=config.seed, device=device,
        share=(ranks.rank, ranks.count), workers=config.workers, resident=resident,
    )  # fmt: skip
    return (
        Batches(
            dataset.train,
            config.batch_size,
            train=True,
            sampling=config.sampling,
            classes=len(dataset.classes),
            **common,
        ),
        Batches(validation, min(config.eval_batch_size, len(validation)), train=False, **common),
    )


def build_optimizer(config: TrainConfig, model: nn.Module, scaled: bool, lr_on: torch.device | None) -> Optimizer:
    """The optimizer at its peak learning rates; ``scaled`` and ``lr_on`` as in `make_optimizer`."""
    muon = None
    if config.optimizer == "muon":
        muon = {"lr": config.muon_lr, "momentum": config.muon_momentum, "weight_decay": config.muon_decay}
    return make_optimizer(
        model,
        config.lr,
        config.momentum,
        config.nesterov,
        config.weight_decay,
        scaled,
        kind="sgd" if config.optimizer == "muon" else config.optimizer,
        betas=parse_betas(config.betas),
        decoupled=config.decoupled,
        bias_lr=config.bias_lr,
        layer_decay=config.layer_decay,
        depths=depths(model),
        muon=muon,
        lr_on=lr_on,
    )
