"""Time to accuracy: `fastres train` from the command line, fused and eager, several seeds."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench.record import ROOT
from bench.workloads import Setting

BACKENDS = ("fused", "eager")
KEPT = ("epoch", "step", "val_accuracy", "seconds", "images_per_second", "peak_memory_mib")


def cases(setting: Setting) -> dict[str, Callable[[], dict[str, Any]]]:
    """See `bench.stages`."""
    seeds = setting.pick(3, 1, 1)
    return {
        f"speed, {backend}, seed {seed}": partial(train, setting, backend, seed)
        for seed in range(seeds)
        for backend in BACKENDS
    }


def train(setting: Setting, backend: str, seed: int, more: Sequence[str] = ()) -> dict[str, Any]:
    """Accuracy after each epoch of the preset ``speed``, with the seconds spent until then; with ``more`` options."""
    options = ["--preset", "speed", "--data", setting.data, "--seed", str(seed)]
    options += ["--device", str(setting.device), "--backend", backend, *more]
    if setting.dry:
        options += "--epochs 1 --limit-train 64 --limit-test 64 --batch-size 32".split()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "fastres.cli", "train", *options, "--out", str(run)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(1, setting.left - 5))
        if done.returncode:
            raise RuntimeError(f"fastres train ended with {done.returncode}: {done.stderr[-300:]}")
        label = json.loads((run / "config.json").read_text())["data"]
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "backend": backend,
        "seed": seed,
        "data": label,
        "epochs": [{key: row[key] for key in KEPT} for row in rows],
    }
