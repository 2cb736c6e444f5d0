"""Decoded images kept as one file, so that they are decoded once."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from fastres.atomic import atomic_write
from fastres.data.dataset import Dataset, Split, first_line

FORMAT = "fastres-images-1"


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/fastres``, or ``~/.cache/fastres``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastres"


def fingerprint(files: Iterable[os.DirEntry | Path]) -> str:
    """A hash of the files' paths, sizes and modification times: another one after any change to them."""
    digest = hashlib.sha256()
    for file in files:
        status = file.stat()
        digest.update(
            f"{os.fspath(file)}\0{status.st_size}\0{status.st_mtime_ns}\0".encode("utf-8", "surrogateescape")
        )
    return digest.hexdigest()


def cached(
    folder: Path | None, key: str, state: str, build: Callable[[], Dataset], say: Callable[[str], None]
) -> Dataset:
    """The dataset of a cache file, or the one that ``build`` makes, which is then kept.

    A file that is damaged or cannot be written costs a warning and the time to decode, never the run.

    Args:
        folder: where cache files are; None: build and keep nothing.
        key: what names the data; there is one file a key.
        state: fingerprint of the data; a file of another one is built anew.
        build: decodes the data.
        say: takes a warning of one line.
    """
    if folder is None:
        return build()
    path = folder / f"{hashlib.sha256(key.encode('utf-8', 'surrogateescape')).hexdigest()[:24]}.npz"
    try:
        dataset = _read(path, state)
    except (FileNotFoundError, NotADirectoryError):
        dataset = None
    except Exception as error:  # a damaged archive can raise anything
        say(f"warning: cache file {path} cannot be used ({first_line(error)}): decoding the images again")
        dataset = None
    if dataset is None:
        dataset = build()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write(path, state, dataset)
        except OSError as error:
            say(f"warning: cannot keep decoded images in {folder} ({first_line(error)}): going on without")
    return dataset


def _write(path: Path, state: str, dataset: Dataset) -> None:
    with atomic_write(path) as file:
        np.savez(
            file,
            identity=np.array([FORMAT, state, dataset.label]),
            classes=np.array(dataset.classes),
            statistics=np.array([dataset.mean, dataset.std]),
            train_images=dataset.train.images.permute(0, 2, 3, 1).numpy(),
            train_labels=dataset.train.labels.numpy(),
            test_images=dataset.test.images.permute(0, 2, 3, 1).numpy(),
            test_labels=dataset.test.labels.numpy(),
        )


def _read(path: Path, state: str) -> Dataset | None:
    """The dataset in a file, or None where it is of another state; any exception means damage."""
    with zipfile.ZipFile(path) as archive:
        if bad := archive.testzip():
            raise ValueError(f"checksum of {bad}")
    with np.load(path, allow_pickle=False) as arrays:
        form, kept, label = arrays["identity"].tolist()
        if (form, kept) != (FORMAT, state):
            return None
        train, test = [
            Split(torch.from_numpy(arrays[f"{name}_images"]).permute(0, 3, 1, 2),
                  torch.from_numpy(arrays[f"{name}_labels"]))
            for name in ("train", "test")
        ]  # fmt: skip
        mean, std = arrays["statistics"].tolist()
        return Dataset(train, test, tuple(arrays["classes"].tolist()), label, tuple(mean), tuple(std))
