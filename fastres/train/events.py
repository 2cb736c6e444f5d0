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

    def write(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add rows of epochs; TensorBoard takes the first row of a process for the next one, whatever was there behind
        it.
        """
        if not self._is_text():
            warn_once(f"TensorBoard takes no folder whose name is not UTF-8, so {self._folder} gets no events")
            return
        for row in rows:
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter

                self._wait_for_a_later_second()
                self._writer = SummaryWriter(self._folder, purge_step=row["step"])
            for name, value in row.items():
                if name not in ("step", "epoch") and value is not None:
                    self._writer.add_scalar(name, value, row["step"])
        if self._writer is not None:
            self._writer.flush()

    def _is_text(self) -> bool:
        try:
            os.fspath(self._folder.absolute()).encode()
        except UnicodeEncodeError:
            return False
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
