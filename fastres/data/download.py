"""CIFAR-10 and CIFAR-100 from the network."""

from __future__ import annotations

import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

from fastres.data.cifar import CIFAR10, Kind, is_genuine
from fastres.data.dataset import DataError, first_line

PATIENCE = 4.0  # seconds that the server has to answer before it counts as out of reach
STALL = 30.0  # seconds without a byte after which a download has failed


def download(root: Path, why: str, say: Callable[[str], None], kind: Kind = CIFAR10) -> None:
    """Download a set to ``root``, verified and unpacked by torchvision; a server out of reach costs
    seconds.

    Args:
        why: what is wrong with the data that is there.
        say: takes a line when the download begins.

    Raises:
        DataError: when the server does not answer, the download breaks off, or ``root`` cannot be written.
    """
    from torchvision.datasets.utils import download_and_extract_archive

    published = kind.published()
    if not reachable(published.url, PATIENCE):
        host = published.url.split("/")[2]
        raise DataError(f"{why}; {host} is out of reach: put {kind.folder} into {root}")
    say(f"{why}: downloading it")
    try:
        with _socket_timeout(STALL):
            download_and_extract_archive(published.url, str(root), filename=published.filename, md5=published.tgz_md5)
        if not is_genuine(root / kind.folder, kind):
            raise RuntimeError("the unpacked files have other checksums than torchvision knows")
    except Exception as error:  # network, disk, archive and checksum faults are of many types
        raise DataError(
            f"the download of {kind.name} to {root} failed ({first_line(error)}): try again or put {kind.folder} there"
        ) from error


def reachable(url: str, seconds: float) -> bool:
    """Whether a server answers in time; in a thread, as nothing else bounds the look-up of its name."""
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
