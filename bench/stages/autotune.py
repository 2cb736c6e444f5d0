"""The timed choice of every fused operation's implementation, made by a step of each network and kept."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench.stages.accuracy import train
from bench.workloads import Setting
from fastres.atomic import atomic_write
from fastres.measure import Step, Workload, synchronize
from fastres.ops import selection
from fastres.ops.timing import choices_path, machine_key

VARIANTS = ("fused", "fused recompute")


def cases(setting: Setting) -> dict[str, Callable[[], dict[str, Any]]]:
    """See `bench.stages`."""
    work = setting.workloads()
    return {
        **{name: partial(tune, setting, one) for name, one in work.items()},
        "preset speed": partial(tune_training, setting),
        **{name: partial(tune, setting, one) for name, one in setting.sweeps().items()},
    }


def tune_training(setting: Setting) -> dict[str, Any]:
    """The preset ``speed``, training and validation, in the shapes that stage `accuracy` has."""
    before = _choices(setting).keys()
    train(setting, "fused", 0, ("--epochs", "1", "--limit-train", "1024"))
    return {"choices": {key: entry for key, entry in _choices(setting).items() if key not in before}}


def tune(setting: Setting, workload: Workload) -> dict[str, Any]:
    """Which implementation ran how many of the shapes; on a GPU also the times that decided."""
    before = _choices(setting).keys()
    known = selection().keys()
    for variant in VARIANTS:
        Step(workload, variant, setting.device, setting.dtype)()
        synchronize(setting.device)
    chosen = {key: name for key, name in selection().items() if key not in known}
    timed = {key: entry for key, entry in _choices(setting).items() if key not in before}
    return {"batch": workload.batch, "shapes": dict(Counter(chosen.values())), "choices": timed}


def restore(setting: Setting, result: Path) -> None:
    """Write the choices of an earlier stage's result to the machine's file, if it has none."""
    if setting.device.type != "cuda" or not result.exists() or choices_path().exists():
        return
    kept: dict[str, Any] = {}
    for case in json.loads(result.read_text())["cases"].values():
        kept |= case.get("choices", {})
    if kept:
        choices_path().parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(choices_path()) as file:
            file.write(json.dumps({machine_key(setting.device): kept}).encode())


def _choices(setting: Setting) -> dict[str, Any]:
    if setting.device.type != "cuda" or not choices_path().exists():
        return {}
    return json.loads(choices_path().read_text()).get(machine_key(setting.device), {})
