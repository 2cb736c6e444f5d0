"""CIFAR-10 and CIFAR-100 as published: from the disk, through the cache, or else from the network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastres.data import cifar, download
from fastres.data.cache import Cache, Facts, digest
from fastres.data.dataset import DataError, Parts, make_parts
from fastres.data.tree import stamp


@dataclass(frozen=True)
class Published:
    """A set of `fastres.data.registry` that has published checksums and an address."""

    kind: cifar.Kind
    reads_root: bool = True

    @property
    def label(self) -> str:
        """What accuracies on it are labelled with."""
        return self.kind.name

    def load(self, root: Path, cache: Cache, say: Callable[[str], None]) -> Parts:
        """The set from its folder under ``root``, where it is downloaded to if it is not there.

        Raises:
            DataError: see `fastres.data.download.download`.
        """
        batches = root / self.kind.folder
        why = f"{self.kind.name} is not under {root}"
        if self.kind.is_in(batches):
            try:
                found = read_folder(batches, self.kind, cache)
                if found.genuine:
                    return found
                why = f"{batches} has not the checksums of {self.kind.name}"
            except DataError as error:
                why = str(error)
        download.download(root, why, say, self.kind)
        return read_folder(batches, self.kind, cache)


def read_folder(path: Path, kind: cifar.Kind, cache: Cache, place: Path | None = None) -> Parts:
    """A ``cifar-10-batches-py`` or ``cifar-100-python`` folder, decoded or from the cache.

    Args:
        place: where the files come from, if not from ``path``.

    Raises:
        DataError: see `fastres.data.cifar.read_batches`.
    """

    def build() -> Parts:
        train, test, classes = cifar.read_batches(path, kind)
        return make_parts({"train": train, "test": test}, classes, genuine=cifar.is_genuine(path, kind))

    files = [path / name for name in kind.files]
    for file in files:
        if not file.is_file():
            raise DataError(f"{file} is missing: {kind.remedy}")
    state = digest(*(f"{file.name} {stamp(file.stat())}" for file in files))
    where = str((place or path).resolve())
    facts = cache.facts(where, state, lambda: Facts(digest(*(file.read_bytes() for file in files))))
    return cache.parts(facts.content, "32", build)
