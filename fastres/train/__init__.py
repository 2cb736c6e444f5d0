"""The training loop: configuration, optimisation, metrics, checkpoints and the run folder."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastres.train.config import TrainConfig
from fastres.train.presets import PRESETS, preset
from fastres.train.signals import Interrupted

if TYPE_CHECKING:
    from fastres.train.trainer import NonFiniteLoss, OverflowingGradients, Trainer

__all__ = ["PRESETS", "Interrupted", "NonFiniteLoss", "OverflowingGradients", "TrainConfig", "Trainer", "preset"]


def __getattr__(name: str) -> Any:
    """What needs PyTorch is imported at its first use: the command line's help does without."""
    if name in __all__:
        return getattr(import_module("fastres.train.trainer"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
