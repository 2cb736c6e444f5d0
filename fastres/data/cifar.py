"""CIFAR-10 from its python batches (Krizhevsky 2009): downloaded by torchvision, unpickled without running any code."""

from __future__ import annotations

import pickle
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch

from fastres.data.dataset import DataError, Split

FOLDER = "cifar-10-batches-py"
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
TRAIN = tuple(f"data_batch_{n}" for n in range(1, 6))
TEST, META = "test_batch", "batches.meta"
FILES = (*TRAIN, TEST, META)
REMEDY = f"unpack {URL} again"
PATIENCE = 4.0  # seconds that the server has to answer before it counts as out of reach
STALL = 30.0  # seconds without a byte after which a download has failed


class _Array:
    """Stands in for numpy's array while it is unpickled, so that no state from the file reaches numpy itself."""

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


def _from_buffer(raw, dtype: _Dtype, shape, order) -> _Array:
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


def unpickle(path: Path) -> dict[str, object]:
    """The dictionary in one batch file: arrays, lists, strings; keys as text. Nothing else in a pickle is obeyed.

    Raises:
        DataError: when the file is missing, truncated, or calls anything but numpy's array reconstruction.
    """
    try:
        with open(path, "rb") as file:
            content = _Unpickler(file, encoding="bytes").load()
        if not isinstance(content, dict):
            raise pickle.UnpicklingError(f"it holds a {type(content).__name__}, not a dictionary")
        return {
            key.decode() if isinstance(key, bytes) else key: value.value if isinstance(value, _Array) else value
            for key, value in content.items()
        }
    except FileNotFoundError:
        raise DataError(f"{path} is missing: {REMEDY}") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise DataError(f"{path} is truncated, damaged or unsafe ({_line(error)}): {REMEDY}") from error


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _read_batch(path: Path, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, 3072] and labels int64 [n] of one file, checked."""
    content = unpickle(path)
    images, labels = content.get("data"), content.get("labels")
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != (3072,) or not len(images):
        found = f"{images.dtype} {list(images.shape)}" if isinstance(images, np.ndarray) else type(images).__name__
        raise DataError(f"{path}: 'data' is {found}, not uint8 [n, 3072]: {REMEDY}")
    try:
        labels = np.array(labels, dtype=np.int64)
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"{path}: 'labels' are not integers: {REMEDY}") from None
    if labels.shape != images.shape[:1]:
        raise DataError(f"{path}: {len(images)} images but labels of shape {list(labels.shape)}: {REMEDY}")
    if labels.min() < 0 or labels.max() >= classes:
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise DataError(f"{path}: label {wrong} is outside 0..{classes - 1}: {REMEDY}")
    return images, labels


def read_batches(folder: Path) -> tuple[Split, Split, tuple[str, ...]]:
    """Training split, test split and class names of a ``cifar-10-batches-py`` folder.

    Raises:
        DataError: for a file that is missing, damaged, unsafe, or holds other shapes or labels out of range.
    """
    names = unpickle(folder / META).get("label_names")
    if not isinstance(names, list) or len(names) != 10 or not all(isinstance(n, (bytes, str)) for n in names):
        raise DataError(f"{folder / META}: 'label_names' is not a list of 10 names: {REMEDY}")
    classes = tuple(n.decode("utf-8", "replace") if isinstance(n, bytes) else n for n in names)

    def split(files: tuple[str, ...]) -> Split:
        parts = [_read_batch(folder / file, len(classes)) for file in files]
        images, labels = (np.concatenate(part) for part in zip(*parts))
        planes = torch.from_numpy(images).view(-1, 3, 32, 32)
        return Split(planes.contiguous(memory_format=torch.channels_last), torch.from_numpy(labels))

    return split(TRAIN), split((TEST,)), classes


def is_genuine(folder: Path) -> bool:
    """Whether all files are there with the checksums that torchvision knows: only then it is called CIFAR-10."""
    from torchvision.datasets import CIFAR10  # here and below: a slow import that other sources do without
    from torchvision.datasets.utils import check_integrity

    known = [*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])]
    return all(check_integrity(str(folder / name), md5) for name, md5 in known)


def download(root: Path, why: str, say: Callable[[str], None]) -> None:
    """Download CIFAR-10 to ``root``, verified and unpacked by torchvision; a server out of reach costs seconds.

    Args:
        why: what is wrong with the data that is there.
        say: takes a line when the download begins.

    Raises:
        DataError: when the server does not answer, the download breaks off, or ``root`` cannot be written.
    """
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import download_and_extract_archive

    if not reachable(CIFAR10.url, PATIENCE):
        host = CIFAR10.url.split("/")[2]
        raise DataError(f"{why}; {host} is out of reach: put {FOLDER} into {root}")
    say(f"{why}: downloading it")
    try:
        with _socket_timeout(STALL):
            download_and_extract_archive(CIFAR10.url, str(root), filename=CIFAR10.filename, md5=CIFAR10.tgz_md5)
        if not is_genuine(root / FOLDER):
            raise RuntimeError("the unpacked files have other checksums than torchvision knows")
    except Exception as error:  # network, disk, archive and checksum faults are of many types
        raise DataError(
            f"the download of CIFAR-10 to {root} failed ({_line(error)}): try again or put {FOLDER} there"
        ) from error


def reachable(url: str, seconds: float) -> bool:
    """Whether a server answers in time. In a thread of its own, as nothing else bounds the look-up of its name."""
    answers = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds):
                answers.append(True)
        except (OSError, HTTPException):
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers)


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """A stalled connection raises instead of waiting for ever; torchvision sets no timeout of its own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
