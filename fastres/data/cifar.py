"""The python batches of CIFAR-10 and CIFAR-100 (Krizhevsky 2009), unpickled without running any code of theirs."""

from __future__ import annotations

import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastres.data.dataset import DataError, Split, first_line


@dataclass(frozen=True)
class Kind:
    """One of the two sets: its files, and the keys of its labels and of their names."""

    name: str
    folder: str
    archive: str
    train: tuple[str, ...]
    test: str
    meta: str
    labels: str
    names: str
    classes: int

    @property
    def files(self) -> tuple[str, ...]:
        """All files of the folder."""
        return (*self.train, self.test, self.meta)

    @property
    def remedy(self) -> str:
        """What helps against damage."""
        return f"unpack https://www.cs.toronto.edu/~kriz/{self.archive} again"

    def is_in(self, path: Path) -> bool:
        """Whether a folder is meant as this set, complete or not."""
        present = sum((path / name).is_file() for name in self.files)
        enough = 1 if len(self.files) > 3 else 2  # one file called train may be anything's
        return path.is_dir() and (path.name == self.folder or present >= enough)

    def published(self) -> Any:
        """torchvision's dataset, which knows the address and the checksums."""
        from torchvision import datasets  # a slow import that other sources do without

        return getattr(datasets, self.name.replace("-", ""))


CIFAR10 = Kind(
    "CIFAR-10", "cifar-10-batches-py", "cifar-10-python.tar.gz", tuple(f"data_batch_{n}" for n in range(1, 6)),
    "test_batch", "batches.meta", "labels", "label_names", 10,
)  # fmt: skip
CIFAR100 = Kind(
    "CIFAR-100", "cifar-100-python", "cifar-100-python.tar.gz", ("train",), "test", "meta", "fine_labels",
    "fine_label_names", 100,
)  # fmt: skip
KINDS = (CIFAR10, CIFAR100)


class _Array:
    """Stands in for numpy's array while it is unpickled: no state from the file reaches numpy itself."""

    def __setstate__(self, state):
        _, shape, dtype, fortran, raw = state
        self.value = np.frombuffer(raw, dtype.code).reshape(shape, order="F" if fortran else "C")


class _Dtype:
    """Stands in for numpy's dtype: plain integers only."""

    def __init__(self, code, *_):
        self.code = code.decode("ascii") if isinstance(code, bytes) else code
        if self.code not in ("u1", "i1", "i2", "i4", "i8"):
            raise pickle.UnpicklingError(f"array of {self.code!r}")

    def __setstate__(self, state):
        pass


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":  # how protocol 2 spells bytes
        raise pickle.UnpicklingError(f"encoding {encoding!r}")
    return text.encode("latin1")


def _from_buffer(raw: Any, dtype: _Dtype, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", raw))
    return array


# everything that a batch may call, by the names of Python 2 and 3, numpy 1 and 2
_ALLOWED = {
    ("_codecs", "encode"): _encode,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
}
for _core in ("numpy.core", "numpy._core"):
    _ALLOWED[f"{_core}.multiarray", "_reconstruct"] = lambda *_: _Array()
    _ALLOWED[f"{_core}.numeric", "_frombuffer"] = _from_buffer


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it calls {module}.{name}, which no batch needs") from None


def _text(value: bytes | str) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def unpickle(path: Path, remedy: str = CIFAR10.remedy) -> dict[str, object]:
    """The dictionary in one batch file, its keys as text: arrays, lists and strings, the rest is refused.

    Raises:
        DataError: when the file is missing, truncated, or calls anything but numpy's array reconstruction.
    """
    try:
        with open(path, "rb") as file:
            content = _Unpickler(file, encoding="bytes").load()
        if not isinstance(content, dict):
            raise pickle.UnpicklingError(f"it holds a {type(content).__name__}, not a dictionary")
        return {_text(key): value.value if isinstance(value, _Array) else value for key, value in content.items()}
    except FileNotFoundError:
        raise DataError(f"{path} is missing: {remedy}") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise DataError(f"{path} is truncated, damaged or unsafe ({first_line(error)}): {remedy}") from error


def _read_batch(path: Path, kind: Kind) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, 3072] and labels int64 [n] of one file, checked."""
    content = unpickle(path, kind.remedy)
    images, labels, classes = content.get("data"), content.get(kind.labels), kind.classes
    found = type(images).__name__
    if isinstance(images, np.ndarray):
        found = f"{images.dtype} {list(images.shape)}"
    if not isinstance(images, np.ndarray) or not re.fullmatch(r"uint8 \[[1-9]\d*, 3072\]", found):
        raise DataError(f"{path}: 'data' is {found}, not uint8 [n, 3072]: {kind.remedy}")
    try:
        labels = np.array(labels)
    except ValueError:  # lists of several lengths
        labels = np.array(None)
    if labels.dtype.kind not in "iu":
        raise DataError(f"{path}: {kind.labels!r} are not integers: {kind.remedy}")
    if labels.shape != images.shape[:1]:
        raise DataError(f"{path}: {len(images)} images but labels of shape {list(labels.shape)}: {kind.remedy}")
    if labels.min() < 0 or labels.max() >= classes:
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise DataError(f"{path}: label {wrong} is outside 0..{classes - 1}: {kind.remedy}")
    return images, labels.astype(np.int64)


def read_batches(folder: Path, kind: Kind = CIFAR10) -> tuple[Split, Split, tuple[str, ...]]:
    """Training split, test split and class names of a ``cifar-10-batches-py`` or ``cifar-100-python`` folder.

    Raises:
        DataError: for a file that is missing, damaged, unsafe, or holds other shapes or labels out of range.
    """
    names = unpickle(folder / kind.meta, kind.remedy).get(kind.names)
    texts = isinstance(names, list) and all(isinstance(name, (bytes, str)) for name in names)
    if not isinstance(names, list) or len(names) != kind.classes or not texts:
        raise DataError(f"{folder / kind.meta}: {kind.names!r} is not a list of {kind.classes} names: {kind.remedy}")
    classes = tuple(_text(name) for name in names)

    def split(files: tuple[str, ...]) -> Split:
        parts = [_read_batch(folder / file, kind) for file in files]
        images, labels = (np.concatenate(part) for part in zip(*parts))
        planes = torch.from_numpy(images).view(-1, 3, 32, 32)
        return Split(planes.contiguous(memory_format=torch.channels_last), torch.from_numpy(labels))

    return split(kind.train), split((kind.test,)), classes


def is_genuine(folder: Path, kind: Kind = CIFAR10) -> bool:
    """Whether all files have the checksums that torchvision knows: only then they have the set's name."""
    from torchvision.datasets.utils import check_integrity

    published = kind.published()
    known = [*published.train_list, *published.test_list, (published.meta["filename"], published.meta["md5"])]
    return all(check_integrity(str(folder / name), md5) for name, md5 in known)
