"""Data sets by name. A new one is a file beside this one that reads it, and a line here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

from fastres.data import cifar, synthetic
from fastres.data.cache import Cache
from fastres.data.dataset import Parts
from fastres.data.published import Published


class Source(Protocol):
    """A data set that has a name."""

    @property
    def label(self) -> str:
        """What accuracies on it are labelled with."""
        ...

    @property
    def reads_root(self) -> bool:
        """Whether it is looked for in the folder ``--data-root``."""
        ...

    def load(self, root: Path, cache: Cache, say: Callable[[str], None]) -> Parts:
        """The images, uint8 [N, 3, H, W], and labels of its splits: "train" and "test" or "val".

        Args:
            root: the folder ``--data-root``.
            cache: of decoded images.
            say: prints a line.

        Raises:
            DataError: where the set is missing or damaged.
        """
        ...


class NamedSet(NamedTuple):
    """A set that is read at each start.

    Attributes:
        label: see `Source`.
        read: from the folder ``--data-root`` to what `Source.load` returns.
        reads_root: see `Source`.
    """

    label: str
    read: Callable[[Path], Parts]
    reads_root: bool = True

    def load(self, root: Path, cache: Cache, say: Callable[[str], None]) -> Parts:
        """See `Source`."""
        return self.read(root)


CIFAR10 = "cifar10"  # which `auto` looks for first
DATASETS: dict[str, Source] = {
    CIFAR10: Published(cifar.CIFAR10),
    "cifar100": Published(cifar.CIFAR100),
    "synthetic": NamedSet(synthetic.LABEL, synthetic.read, reads_root=False),
}
