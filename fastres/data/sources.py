"""Where labelled images come from: CIFAR-10, an image folder, CIFAR's batches, or the built-in drawn set."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

from fastres.data import cifar, download, folder, synthetic
from fastres.data.cache import cached, default_folder, fingerprint
from fastres.data.dataset import DataError, Dataset, make_dataset

logger = logging.getLogger(__name__)
SOURCES = ("auto", "cifar10", "synthetic")
IMAGE_SIZE = 32
SYNTHETIC_SIZES = 10_000, 2_000
GENUINE = "CIFAR-10"


class Loader:
    """Reads any source, through one cache folder and with one way to speak."""

    def __init__(self, image_size: int | None, cache_folder: Path | None, say: Callable[[str], None]):
        self.image_size, self.cache_folder, self.say = image_size, cache_folder, say

    def cifar10(self, root: Path) -> Dataset:
        """CIFAR-10 as published, from ``root`` or from the network."""
        batches = root / cifar.FOLDER
        why = f"CIFAR-10 is not under {root}"
        if has_batches(batches):
            try:
                dataset = self.batches(batches)
                if dataset.label == GENUINE:
                    return dataset
                why = f"{batches} has not the checksums of CIFAR-10"
            except DataError as error:
                why = str(error)
        download.download(root, why, self.say)
        return self.batches(batches)

    def batches(self, path: Path) -> Dataset:
        """A ``cifar-10-batches-py`` folder; it is called CIFAR-10 only if its checksums are CIFAR-10's."""

        def build() -> Dataset:
            train, test, classes = cifar.read_batches(path)
            other = f"batches {path.resolve().name} ({len(train)} images)"
            label = GENUINE if cifar.is_genuine(path) else other
            return make_dataset(train, test, classes, label)

        files = [path / name for name in cifar.FILES]
        for file in files:
            if not file.is_file():
                raise DataError(f"{file} is missing: {cifar.REMEDY}")
        return cached(self.cache_folder, f"batches {path.resolve()}", fingerprint(files), build, self.say)

    def image_folder(self, path: Path) -> Dataset:
        """An image folder ``PATH/{train,test}/CLASS/*``."""

        def build() -> Dataset:
            train, test, classes = folder.read_image_folder(path, side)
            name = path.resolve().name
            return make_dataset(train, test, classes, f"image folder {name} ({len(train)} images)")

        _, files = folder.list_images(path)
        side = IMAGE_SIZE if self.image_size is None else folder.stored_side(files, self.image_size)
        state = fingerprint(entry for split in files.values() for members in split for entry in members)
        return cached(self.cache_folder, f"folder {path.resolve()} {side}", state, build, self.say)

    def synthetic(self) -> Dataset:
        """The built-in drawn set."""
        train, test = (synthetic.synthetic_split(n, split=i) for i, n in enumerate(SYNTHETIC_SIZES))
        return make_dataset(train, test, synthetic.CLASSES, synthetic.LABEL)

    def path(self, path: Path) -> Dataset:
        """The image folder or the batches at ``path`` or right under it."""
        if not path.is_dir():
            raise DataError(
                f"data {str(path)!r} is not a folder: give {', '.join(SOURCES)} or an existing folder"
            )
        if has_images(path):
            return self.image_folder(path)
        for batches in (path, path / cifar.FOLDER):
            if has_batches(batches):
                return self.batches(batches)
        raise DataError(
            f"folder {path} holds neither train/CLASS/IMAGE and test/CLASS/IMAGE nor {cifar.FOLDER}: "
            f"arrange it so, or give {', '.join(SOURCES)}"
        )

    def auto(self, root: Path) -> Dataset:
        """The first source that is there, with a word on those before it that are not.

        One that is there but damaged is an error: falling through would train on other data than was meant.
        """
        missing = []
        try:
            dataset = self.cifar10(root)
        except DataError as error:
            missing.append(str(error))
            if has_images(root):
                dataset = self.image_folder(root)
            elif has_batches(root / cifar.FOLDER):
                missing.append(f"no image folder {root}/{{train,test}}/CLASS")
                dataset = self.batches(root / cifar.FOLDER)
            else:
                missing += [f"no image folder {root}/{{train,test}}/CLASS", f"no {root / cifar.FOLDER}"]
                dataset = self.synthetic()
        self.say("; ".join([f"data: {dataset.label}", *(f"not taken: {reason}" for reason in missing)]))
        return dataset


def has_images(path: Path) -> bool:
    """Whether a folder is meant as an image folder, complete or not."""
    return (path / "train").is_dir() or (path / "test").is_dir()


def has_batches(path: Path) -> bool:
    """Whether a folder is meant as one of CIFAR's batches, complete or not."""
    return any((path / name).is_file() for name in cifar.FILES) or (
        path.is_dir() and path.name == cifar.FOLDER
    )


def load(
    source: str | os.PathLike = "auto",
    root: str | os.PathLike = "data",
    image_size: int | None = None,
    cache: bool | str | os.PathLike = True,
    say: Callable[[str], None] = logger.warning,
) -> Dataset:
    """Load labelled images.

    Args:
        source: ``cifar10``: as published, from ``root``, else downloaded to it by torchvision. ``synthetic``:
            ten drawn shapes, built in. A path: an image folder ``PATH/{train,test}/CLASS/*``, or
            ``cifar-10-batches-py`` or the folder it is in. ``auto``: the first that is there of CIFAR-10, an
            image folder ``root``, ``root/cifar-10-batches-py`` and the synthetic set; ``say`` hears which one
            and why not those before it.
        root: where ``auto`` and ``cifar10`` look.
        image_size: side in pixels that an image folder's images are brought to (32 if None), or what they have
            where that is less; CIFAR-10 and the synthetic set always have 32, see `Augment.resize`.
        cache: keep decoded images in `cache.default_folder`, or in this folder, or not at all.
        say: takes one line: what was chosen, downloads, warnings.

    Raises:
        DataError: when the source is missing or damaged; the message names the file and the remedy.
    """
    if image_size is not None and image_size < 1:
        raise DataError(f"image size {image_size} must be at least 1 pixel")
    cache_folder = default_folder() if cache is True else None if cache is False else Path(cache)
    loader = Loader(image_size, cache_folder, say)
    if source == "auto":
        return loader.auto(Path(root))
    if source == "cifar10":
        return loader.cifar10(Path(root))
    if source == "synthetic":
        return loader.synthetic()
    return loader.path(Path(source))
