"""The timed choice of every fused operation's implementation, made by a step of each network and kept."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench.workloads import Setting
from fastres.atomic import atomic_write
from fastres.measure import Step, Workload, synchronize
from fastres.ops import selection
from fastres.ops.timing import choices_path, machine_key


def cases(setting: Setting) -> dict[str, Callable[[], dict[str, Any]]]:
    """See `bench.stages`."""
    return {
        name: partial(tune, setting, one) for name, one in {**setting.workloads(), **setting.sweeps()}.items()
    }


def tune(setting: Setting, workload: Workload) -> dict[str, Any]:
    """Which implementation ran how many of the shapes; on a GPU also the times that decided."""
    before = _choices(setting).keys()
    known = selection().keys()
    step = Step(workload, "fused", setting.device, setting.dtype)
    step()
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
