"""Options that were given and would do nothing: each is refused, as it was meant to do something."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from fastres.data.registry import DATASETS
from fastres.errors import FastresError
from fastres.train.config import ADAPTIVE, TrainConfig

_ROOTED = ["auto", *(name for name, source in DATASETS.items() if source.reads_root)]
# option -> (what makes it work, whether it does)
_NEEDS: dict[str, tuple[str, Callable[[TrainConfig], bool]]] = {
    **dict.fromkeys(
        ("muon_lr", "muon_momentum", "muon_decay"), ("--optimizer muon", lambda config: config.optimizer == "muon")
    ),
    **dict.fromkeys(
        ("milestones", "decay_factor"), ("--schedule step", lambda config: config.schedule == "step")
    ),
    "betas": ("--optimizer adamw or lamb", lambda config: config.optimizer in ADAPTIVE),
    **dict.fromkeys(
        ("momentum", "nesterov"), ("--optimizer sgd or muon", lambda config: config.optimizer not in ADAPTIVE)
    ),
    "warmup": (
        "a --schedule that is not constant", lambda config: config.schedule != "constant" or config.warmup == 0
    ),
    "magnitude": ("--auto-augment rand", lambda config: config.auto_augment == "rand"),
    "crop_pad": ("the padded crop, which --crop-scale replaces", lambda config: config.crop_scale is None),
    "tta_shift": ("--tta", lambda config: config.tta or config.tta_shift == 0),
    "val_seed": ("--val-share", lambda config: config.val_share is not None),
    "data_root": (
        f"--data {' or '.join(_ROOTED)}",
        lambda config: config.data == "auto" or config.data in DATASETS and DATASETS[config.data].reads_root,
    ),
}  # fmt: skip


def check_given(configs: Iterable[TrainConfig], given: Iterable[str]) -> None:
    """Refuse options that were given and that no configuration heeds.

    Raises:
        FastresError: names the first one and what it needs.
    """
    configs = list(configs)
    for name in given:
        needed, works = _NEEDS.get(name, ("", lambda config: True))
        if not any(map(works, configs)):
            raise FastresError(
                f"--{name.replace('_', '-')} does nothing without {needed}: add it, or leave the option out"
            )
