"""The networks in plain eager PyTorch: what every faster form is checked against."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from fastres.reference.cifar import cifar_resnet
from fastres.reference.notebook import NotebookResNet
from fastres.reference.preact import preact_resnet
from fastres.reference.resnet import resnet, resnet8
from fastres.reference.speed import speed

MODELS: dict[str, Callable[..., nn.Module]] = {
    "notebook": NotebookResNet,
    "resnet8": resnet8,
    "speed": speed,
    **{f"resnet{depth}": partial(resnet, depth) for depth in (18, 34, 50, 101, 152)},
    **{f"resnet{depth}": partial(cifar_resnet, depth) for depth in (20, 32, 44, 56, 110, 1202)},
    **{f"preact_resnet{depth}": partial(preact_resnet, depth) for depth in (164, 1001)},
}
