"""Images from files: ``ROOT/{train,test}/CLASS/*``, each cropped to its central square and resized."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from fastres.data.dataset import DataError, Split, first_line

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".tif", ".tiff")
TASK = 64  # images that a thread decodes at a time


def read_image(path: str | os.PathLike, size: int) -> np.ndarray:
    """One image as uint8 [size, size, 3]: RGB, central square, bilinear with antialiasing.

    Raises:
        DataError: when the file is missing, truncated or not an image.
    """
    try:
        with Image.open(path) as file:
            file.draft("RGB", (size, size))  # a JPEG decodes at a fraction of its size, not below this one
            image = file.convert("RGB")
            if image.size != (size, size):
                side = min(image.size)
                left, top = (image.width - side) // 2, (image.height - side) // 2
                square = image.crop((left, top, left + side, top + side))
                image = square.resize((size, size), Image.Resampling.BILINEAR)
            return np.asarray(image)
    except FileNotFoundError:
        raise DataError(f"image {path} does not exist: check its name") from None
    except Exception as error:  # Pillow's decoders raise many types on damaged files
        raise DataError(f"image {path} cannot be read ({first_line(error)}): replace or remove it") from error


def read_images(paths: Sequence[str | os.PathLike], size: int, desc: str | None = None) -> Tensor:
    """Images as uint8 [N, 3, size, size], channels_last, decoded in parallel threads.

    Args:
        paths: image files.
        size: side in pixels, see `read_image`.
        desc: what a progress bar on a terminal is called; None: no bar.

    Raises:
        DataError: for the first file that cannot be read.
    """
    images = np.empty((len(paths), size, size, 3), np.uint8)

    def decode(start: int) -> int:
        part = paths[start : start + TASK]
        for number, path in enumerate(part, start):
            images[number] = read_image(path, size)
        return len(part)

    workers = ThreadPoolExecutor(os.cpu_count())
    try:
        disable = None if desc else True  # None: where there is no terminal
        with tqdm(total=len(paths), desc=desc, unit="image", leave=False, disable=disable) as bar:
            for done in workers.map(decode, range(0, len(paths), TASK)):
                bar.update(done)
    finally:
        workers.shutdown(cancel_futures=True)
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def _entries(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        raise DataError(
            f"folder {folder} cannot be read ({error.strerror}): check it and its permissions"
        ) from error


def list_images(root: Path) -> tuple[tuple[str, ...], dict[str, list[list[os.DirEntry]]]]:
    """Class names, sorted, and for "train" and "test" each class's image files, sorted by name.

    Raises:
        DataError: when a split is missing, the splits' classes differ, there are fewer than two, or one has
            no image.
    """
    files: dict[str, list[list[os.DirEntry]]] = {}
    names: dict[str, tuple[str, ...]] = {}
    for split in ("train", "test"):
        if not (root / split).is_dir():
            raise DataError(f"image folder {root} has no folder '{split}': make {root / split}/CLASS/IMAGE")
        folders = [e for e in _entries(root / split) if e.is_dir()]
        names[split] = tuple(e.name for e in folders)
        files[split] = [
            [e for e in _entries(Path(f.path)) if e.name.lower().endswith(SUFFIXES) and e.is_file()]
            for f in folders
        ]
        for name, members in zip(names[split], files[split]):
            if not members:
                raise DataError(
                    f"class folder {root / split / name} holds no image ({' '.join(SUFFIXES)}): add some"
                )
    for one, other in (("train", "test"), ("test", "train")):
        if lacking := sorted(set(names[one]) - set(names[other])):
            raise DataError(
                f"class {lacking[0]!r} is in {root / one} but not in {root / other}: "
                "both need the same class folders"
            )
    if len(names["train"]) < 2:
        raise DataError(
            f"image folder {root / 'train'} has {len(names['train'])} class folders: at least 2 are needed"
        )
    return names["train"], files


def stored_side(files: dict[str, list[list[os.DirEntry]]], size: int) -> int:
    """``size``, or what the first training image of every class has if that is less: decoding enlarges nothing.

    Raises:
        DataError: when one of them cannot be read.
    """
    sides = []
    for members in files["train"]:
        path = members[0].path
        try:
            with Image.open(path) as image:
                sides.append(min(image.size))
        except Exception as error:  # Pillow's decoders raise many types on damaged files
            raise DataError(f"image {path} cannot be read ({first_line(error)}): replace or remove it") from error
    return min(size, max(sides))


def read_image_folder(root: Path, size: int) -> tuple[Split, Split, tuple[str, ...]]:
    """Training split, test split and class names of an image folder, at ``size`` x ``size``.

    Raises:
        DataError: see `list_images` and `read_image`.
    """
    classes, files = list_images(root)

    def split(name: str) -> Split:
        labels = [label for label, members in enumerate(files[name]) for _ in members]
        paths = [entry.path for members in files[name] for entry in members]
        return Split(read_images(paths, size, desc=f"decoding {name}"), torch.tensor(labels))

    return split("train"), split("test"), classes
