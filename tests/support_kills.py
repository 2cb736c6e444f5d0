"""A process of the test that kills a run around a write; a module of its own, as the fork server imports it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import support_process
from support_train import tiny_trainer

OPTIONS = dict(model="resnet8", lr=1e-3)  # so slow that the second epoch is the better one


def train_and_die(folder: Path, number: int, moment: str) -> None:
    """Train in ``folder`` and end by SIGKILL "before" or "after" the ``number``-th file takes its place."""
    support_process.begin()
    replace, calls = os.replace, []

    def deadly(source: str, target: str) -> None:
        calls.append(target)
        if len(calls) == number and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = deadly
    tiny_trainer(folder, **OPTIONS).fit()
