"""Whether a run folder, its checkpoint, the options that are asked for and the data are those of one run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from fastres.errors import FastresError
from fastres.train.config import TrainConfig

# Where and how a run computes, and when it saves: none of them is what it computes.
PLACE = {
    "device", "data", "data_root", "compile", "recompute", "save_steps", "save_minutes", "requeue", "memory_budget",
    "workers",
}  # fmt: skip
# A run may go on longer than it was meant to.
LENGTH = {"epochs", "steps", "patience"}
# A resumed run keeps its other options. Another backend rounds otherwise, so it changes only where that is asked for.
CHANGED_BY_RESUME = PLACE | LENGTH | {"backend"}
CHOSEN_BY_MACHINE = {"backend", "precision"}  # where they are auto; a run keeps the choice that it began with


def checksum(content: Any) -> str:
    """SHA-256 of a nest of plain values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_same_weights(facts: dict[str, Any], config: TrainConfig, place: Path) -> None:
    """Refuse to go on unasked with a run that started from other weights under the same name.

    Args:
        facts: the content of the run's ``config.json``.

    Raises:
        FastresError: names the folder.
    """
    if config.weights is not None and facts.get("initial") is not None:
        from fastres.train.pretrained import read_weights

        if read_weights(config.weights, config.model).digest != facts["initial"]:
            raise FastresError(
                f"{place} started from other weights than {config.weights} holds now: choose another --out"
            )


def difference(saved: TrainConfig, wanted: TrainConfig) -> str | None:
    """In a few words the first option in which a saved run is not the one that is asked for; None: it is."""
    theirs, ours = saved.to_dict(), wanted.to_dict()
    for name in ours:
        by_machine = name in CHOSEN_BY_MACHINE and ours[name] == "auto"
        if name not in PLACE and not by_machine and theirs[name] != ours[name]:
            return f"{name} {theirs[name]}, not {ours[name]}"
    return None


def check_same_run(saved: dict[str, Any], facts: dict[str, Any] | None, source: Path) -> None:
    """Refuse a checkpoint that is not of the run whose `facts`, the content of ``config.json``, lie beside it.

    Raises:
        FastresError: for another run's, or one with other options or data.
    """
    if facts is None:
        return
    options, kept = saved["options"], facts["options"]
    fixed = [name for name in kept if name not in CHANGED_BY_RESUME and options.get(name) != kept[name]]
    if fixed:
        name = fixed[0]
        raise FastresError(
            f"{source} was trained with {name} {options.get(name)}, but config.json beside it says {kept[name]}: "
            "put back the one that was changed"
        )
    if facts.get("run", saved["run"]) != saved["run"] or facts.get("digest", saved["digest"]) != saved["digest"]:
        raise FastresError(
            f"{source} is of another run than config.json beside it: put back the run's own file, or give the "
            "checkpoint a folder of its own"
        )
