"""The training loop: configuration, optimisation, metrics, checkpoints and the run folder."""

from fastres.train.config import TrainConfig
from fastres.train.presets import PRESETS, preset
from fastres.train.trainer import Interrupted, NonFiniteLoss, OverflowingGradients, Trainer

__all__ = ["PRESETS", "Interrupted", "NonFiniteLoss", "OverflowingGradients", "TrainConfig", "Trainer", "preset"]
