"""zip and tar archives as trees of files: read where they are, so that no name in one decides where anything is
written.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import posixpath
import shutil
import stat
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from fastres.data.dataset import DataError, first_line
from fastres.data.tree import BROKEN_LINK, NO_FILE, UNSAFE, Member, Tree, hidden, stamp

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
LARGEST = 1 << 29  # bytes of one file, unpacked
TOO_LARGE = f"files larger than {LARGEST >> 20} MiB"
RATIO = 100  # a compressed tar of images that unpacks to more than so many times its size is a bomb
SPARE = 1 << 30  # but so many bytes are always allowed, and left free on the disk
CHUNK = 1 << 20
PACKED: dict[bytes, Callable[[BinaryIO], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}


def is_archive(path: Path) -> bool:
    """Whether a file is one by its name."""
    return path.name.lower().endswith(SUFFIXES)


def open_archive(path: Path) -> Tree:
    """The tree of an archive, which stays open as long as its members are there.

    A name that leads out of the archive is left out, and so is a file that is larger than `LARGEST`.

    Raises:
        DataError: when it is damaged or encrypted, or unpacks to far more than images do.
    """
    try:
        return _zip(path) if zipfile.is_zipfile(path) else _tar(path)
    except DataError:
        raise
    except Exception as error:  # damaged archives raise many types
        raise DataError(
            f"archive {path} cannot be read ({first_line(error)}): make it anew, or unpack it and name the folder"
        ) from error


class _Filler:
    """Puts entries into a tree."""

    def __init__(self, path: Path):
        self.path, self.tree = path, Tree(str(path))
        self.stamp = stamp(path.stat())

    def parts(self, name: str) -> tuple[str, ...] | None:
        """The path of an entry; None: it is unsafe, hidden, or the root."""
        name = name.replace("\\", "/")
        parts = tuple(part for part in name.split("/") if part not in ("", "."))
        if name.startswith("/") or ".." in parts or (parts and parts[0].endswith(":")):
            self.leave_out(parts, name, UNSAFE)
            return None
        return parts if parts and not any(hidden(part) for part in parts) else None

    def leave_out(self, parts: tuple[str, ...], name: str, reason: str) -> None:
        """Note an entry that is not read."""
        self.tree.left_out.append((parts, f"{self.path}/{name}", reason))

    def folder(self, parts: tuple[str, ...]) -> None:
        """Add a folder and those around it."""
        self.tree.folders.update(parts[:n] for n in range(len(parts) + 1))

    def file(self, parts: tuple[str, ...], size: int, mark: object, read: partial[bytes]) -> None:
        """Add a file."""
        where = "/".join((str(self.path), *parts))
        if size > LARGEST:
            self.tree.left_out.append((parts, where, TOO_LARGE))
            return
        self.folder(parts[:-1])
        self.tree.members.append(Member(parts, where, f"{self.stamp} {mark}", read))

    def done(self) -> Tree:
        """The tree, its members sorted by name and the last one taken of those of one name."""
        latest = {member.parts: member for member in self.tree.members}
        self.tree.members = [latest[parts] for parts in sorted(latest)]
        return self.tree


def _zip(path: Path) -> Tree:
    archive, filler = zipfile.ZipFile(_Positioned(path)), _Filler(path)
    for info in archive.infolist():
        parts = filler.parts(info.filename)
        if parts is None:
            continue
        if info.is_dir():
            filler.folder(parts)
        elif info.flag_bits & 1:
            raise DataError(f"archive {path} is encrypted ({info.filename}): unpack it and name the folder with --data")
        elif stat.S_ISLNK(info.external_attr >> 16):
            filler.leave_out(parts, info.filename, "links")
        else:
            filler.file(parts, info.file_size, info.CRC, partial(archive.read, info))  # no more than it says itself
    return filler.done()


class _Positioned(io.RawIOBase):
    """A file to read whose position is this object's own: processes that were forked share the one of an open file."""

    def __init__(self, path: Path):
        self._file, self._at = open(path, "rb"), 0  # noqa: SIM115  it stays open

    def seekable(self) -> bool:  # noqa: D102
        return True

    def readable(self) -> bool:  # noqa: D102
        return True

    def tell(self) -> int:  # noqa: D102
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:  # noqa: D102
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at}.get(whence, os.fstat(self._file.fileno()).st_size)
        self._at = start + offset
        return self._at

    def readinto(self, buffer: Any) -> int:  # noqa: D102
        count = os.preadv(self._file.fileno(), [buffer], self._at)
        self._at += count
        return count


def _tar(path: Path) -> Tree:
    file, filler = _plain(path), _Filler(path)
    found: dict[str, tarfile.TarInfo] = {}
    links: list[tuple[tuple[str, ...], tarfile.TarInfo]] = []
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for info in archive:
            parts = filler.parts(info.name)
            if parts is None:
                continue
            if info.isdir():
                filler.folder(parts)
            elif info.islnk() or info.issym():
                links.append((parts, info))
            elif info.isreg() and not info.issparse():
                found["/".join(parts)] = info
                filler.file(parts, info.size, info.offset_data, partial(_read, file, info.offset_data, info.size))
            else:
                filler.leave_out(parts, info.name, NO_FILE)
    for parts, link in links:
        base = "/".join(parts[:-1]) if link.issym() else ""
        target = found.get(posixpath.normpath(posixpath.join(base, link.linkname)))
        if target is None:
            filler.leave_out(parts, link.name, BROKEN_LINK)
        else:
            filler.file(parts, target.size, target.offset_data, partial(_read, file, target.offset_data, target.size))
    return filler.done()


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    return os.pread(file.fileno(), size, offset)  # from any thread


def _plain(path: Path) -> BinaryIO:
    """A tar file that is not compressed: itself, or unpacked to a file that has no name and goes when it is closed."""
    file = open(path, "rb")  # noqa: SIM115  it stays open
    start = file.read(6)
    unpack = next((unpack for magic, unpack in PACKED.items() if start.startswith(magic)), None)
    file.seek(0)
    if unpack is None:
        return file
    plain = tempfile.TemporaryFile()  # noqa: SIM115
    allowed = RATIO * path.stat().st_size + SPARE
    with file, unpack(file) as packed:
        written = 0
        while chunk := packed.read(CHUNK):
            written += len(chunk)
            if written > allowed:
                raise DataError(
                    f"archive {path} unpacks to more than {RATIO} times its size, as no images do: unpack it yourself "
                    "and name the folder with --data"
                )
            if written % (64 * CHUNK) < CHUNK and shutil.disk_usage(tempfile.gettempdir()).free < SPARE:
                raise DataError(f"archive {path} does not fit {tempfile.gettempdir()}: free space there, or set TMPDIR")
            plain.write(chunk)
    plain.seek(0)
    return plain  # type: ignore[return-value]
