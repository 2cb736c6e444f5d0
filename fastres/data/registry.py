"""Data sets by name. A new one is a file beside this one that reads it, and a line here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fastres.data import synthetic
from fastres.data.dataset import Parts


class NamedSet(NamedTuple):
    """A data set that has a name.

    Attributes:
        label: what accuracies on it are labelled with.
        read: from the folder ``--data-root`` to the images, uint8 [N, 3, H, W], and labels of its splits: "train" and
            "test" or "val". It raises `DataError` where the set is missing or damaged.
    """

    label: str
    read: Callable[[Path], Parts]


DATASETS: dict[str, NamedSet] = {"synthetic": NamedSet(synthetic.LABEL, synthetic.read)}
