"""The metrics as TensorBoard events."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastres.atomic import warn_once

PREFIX = "events.out.tfevents."  # of the files' names


class Events:
    """TensorBoard events in a folder; the writer is made at the first row, as its import is slow."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._writer: Any = None  # a SummaryWriter
        self._handle: int | None = None  # of the folder, where its name is not UTF-8

    def write(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add rows of epochs; TensorBoard takes the first row of a process for the next one, whatever was there behind
        it.
        """
        for row in rows:
            if self._writer is None and not self._open(row["step"]):
                return
            for name, value in row.items():
                if name not in ("step", "epoch") and value is not None:
                    self._writer.add_scalar(name, value, row["step"])
        if self._writer is not None:
            self._writer.flush()

    def _open(self, step: int) -> bool:
        """Make the writer; False where there can be none."""
        from torch.utils.tensorboard import SummaryWriter

        place = os.fspath(self._folder.absolute())
        if not _is_utf8(place):  # which TensorBoard cannot take: the kernel has another name of the same folder
            self._handle = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
            place = f"/proc/self/fd/{self._handle}"
            if not os.path.isdir(place):
                warn_once(f"TensorBoard takes no folder whose name is not UTF-8, so {self._folder} gets no events")
                return False
        self._wait_for_a_later_second()
        self._writer = SummaryWriter(place, purge_step=step)
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
