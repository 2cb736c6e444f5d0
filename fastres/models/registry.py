"""From a network's name and options to the network."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from fastres.errors import FastresError
from fastres.reference.cifar import cifar_resnet
from fastres.reference.notebook import NotebookResNet
from fastres.reference.preact import preact_resnet
from fastres.reference.resnet import resnet, resnet8
from fastres.reference.speed import speed, speed94, speed95, speed96

MODELS: dict[
    str, Callable[..., nn.Module]
] = {  # by name, what builds the eager network from num_classes and its options
    "notebook": NotebookResNet,
    "resnet8": resnet8,
    "speed": speed,
    "speed94": speed94,
    "speed95": speed95,
    "speed96": speed96,
    **{f"resnet{depth}": partial(resnet, depth) for depth in (18, 34, 50, 101, 152)},
    **{f"resnet{depth}": partial(cifar_resnet, depth) for depth in (20, 32, 44, 56, 110, 1202)},
    **{f"preact_resnet{depth}": partial(preact_resnet, depth) for depth in (164, 1001)},
}


def model_names() -> list[str]:
    """Every name that `create_model` knows."""
    return list(MODELS)


def create_model(name: str, num_classes: int = 10, **options: Any) -> nn.Module:
    """Build a network with fresh weights from PyTorch's global random generator.

    Args:
        name: one of `model_names`.
        num_classes: width of the last layer.
        options: the constructor's own options, such as ``stem`` or ``checkpoint_every``.

    Raises:
        FastresError: for an unknown name (the nearest one is named) or an option that this network has not.
    """
    if unknown := sorted(set(options) - set(accepted_options(name))):
        raise FastresError(f"model {name!r} has no option {unknown[0]!r}: it takes {', '.join(accepted_options(name))}")
    return MODELS[name](num_classes=num_classes, **options)


def accepted_options(name: str) -> list[str]:
    """Names of the options of a network's constructor.

    Raises:
        FastresError: for an unknown name.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise FastresError(f"unknown model {name!r}: {hint}`fastres models` lists them all")
    parameters = inspect.signature(MODELS[name]).parameters.values()
    return [p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name != "num_classes"]


def describe_models() -> list[tuple[str, int, str]]:
    """(name, number of parameters with 10 classes, first line of the constructor's documentation) of each."""
    with torch.device("meta"):  # counts need shapes, not memory
        return [
            (
                name,
                sum(p.numel() for p in create_model(name).parameters()),
                (inspect.getdoc(getattr(MODELS[name], "func", MODELS[name])) or "").split("\n")[0],
            )
            for name in MODELS
        ]
