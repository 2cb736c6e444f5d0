"""The metrics as TensorBoard events: scalars, the options as hyper-parameters, and pictures."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastres.atomic import warn_once

PREFIX = "events.out.tfevents."  # of the files' names
# key of an epoch's row -> tag; what is before the slash is a group of charts
TAGS = {
    "train_loss": "loss/train",
    "val_loss": "loss/val",
    "train_accuracy": "accuracy/train",
    "val_accuracy": "accuracy/val",
    "tta_accuracy": "accuracy/tta",
    "lr": "optimizer/lr",
    "skipped_steps": "optimizer/skipped_steps",
    "images_per_second": "speed/images_per_second",
    "train_seconds_per_batch": "speed/train_seconds_per_batch",
    "val_seconds_per_batch": "speed/val_seconds_per_batch",
    "train_seconds": "speed/train_seconds",
    "waited_seconds": "speed/waited_seconds",
    "seconds": "speed/seconds",
    "peak_memory_mib": "speed/peak_memory_mib",
}
# charts with several lines, under "Custom scalars"
CHARTS = {
    "training": {
        "loss": ["Multiline", ["loss/train", "loss/val"]],
        "accuracy": ["Multiline", ["accuracy/train", "accuracy/val", "accuracy/tta"]],
    }
}


class Events:
    """TensorBoard events in a folder; the writer is made at the first row, as its import is slow.

    Attributes:
        options: what the run's hyper-parameters are; None: they are not shown.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._writer: Any = None  # a SummaryWriter
        self._handle: int | None = None  # of the folder, where its name is not UTF-8
        self.options: dict[str, Any] | None = None

    def write(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add rows of epochs; TensorBoard takes the first row of a process for the next one, whatever was there behind
        it.
        """
        for row in rows:
            if self._writer is None and not self._open(row["step"]):
                return
            for name, value in row.items():
                if name not in ("step", "epoch") and value is not None:
                    self._writer.add_scalar(TAGS.get(name, name), value, row["step"])
        if self._writer is not None:
            self._writer.flush()

    def write_picture(self, tag: str, pixels: Any, step: int) -> None:
        """Add a picture, uint8 [H, W, 3], beside the rows up to a step."""
        if self._writer is None and not self._open(step + 1):  # of the rows that are there none goes
            return
        self._writer.add_image(tag, pixels, step, dataformats="HWC")
        self._writer.flush()

    def _open(self, step: int) -> bool:
        """Make the writer; rows of earlier files from a step on count no more. False: there can be none."""
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        place = os.fspath(self._folder.absolute())
        if not _is_utf8(place):  # which TensorBoard cannot take: the kernel has another name of the same folder
            self._handle = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
            place = f"/proc/self/fd/{self._handle}"
            if not os.path.isdir(place):
                warn_once(f"TensorBoard takes no folder whose name is not UTF-8, so {self._folder} gets no events")
                return False
        self._wait_for_a_later_second()
        self._writer = SummaryWriter(place, purge_step=step)
        self._writer.add_custom_scalars(CHARTS)
        if self.options is not None:
            values = {name: _shown(value) for name, value in self.options.items()}
            metrics = {TAGS["val_accuracy"]: None, TAGS["val_loss"]: None}
            for summary in hparams(values, metrics):  # beside the scalars: add_hparams would make a run of its own
                self._writer.file_writer.add_summary(summary)
        return True

    def _wait_for_a_later_second(self) -> None:
        """TensorBoard reads the files in the order of their names, which begin with the second."""
        taken = {path.name.removeprefix(PREFIX).split(".")[0] for path in self._folder.glob(f"{PREFIX}*")}
        if str(int(time.time())) in taken:
            time.sleep(1.0)

    def close(self) -> None:
        """End the file."""
        if self._writer is not None:
            self._writer.close()
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: Any) -> Any:
    """An option as a hyper-parameter can have it."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    return "none" if value is None else value
