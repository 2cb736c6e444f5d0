"""The files of a folder or an archive as one list, whatever holds them."""

from __future__ import annotations

import os
import stat
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from fastres.data.dataset import DataError

BROKEN_LINK, NO_FILE, LOOP, UNSAFE = (
    "broken links",
    "not regular files",
    "links to a folder around them",
    "unsafe names",
)
NAMED = 10  # files of each kind that a line names


class Member(NamedTuple):
    """A file: its path within the tree, what messages call it, and a stamp that changes when it does."""

    parts: tuple[str, ...]
    where: str
    stamp: str
    read: Callable[[], bytes]


@dataclass
class Tree:
    """All files and folders in a place, sorted by name; hidden ones are not in it.

    ``left_out``: path, what messages call it, and which kind of thing it is that cannot be read.
    """

    where: str
    members: list[Member] = field(default_factory=list)
    folders: set[tuple[str, ...]] = field(default_factory=lambda: {()})
    left_out: list[tuple[tuple[str, ...], str, str]] = field(default_factory=list)

    def children(self, base: tuple[str, ...]) -> list[str]:
        """Names of the folders in a folder."""
        return sorted(parts[-1] for parts in self.folders if parts and parts[:-1] == base)


def hidden(name: str) -> bool:
    """Whether a file is one of the system's own, such as ``.DS_Store``."""
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db", "desktop.ini")


def read_file(path: str) -> bytes:
    """A file's bytes.

    Raises:
        OSError: when it cannot be read.
        ValueError: when it is no regular file.
    """
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would wait for its writer for ever
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no regular file")
        raw = os.read(file, status.st_size + 1)
        while len(raw) < status.st_size and (more := os.read(file, status.st_size)):
            raw += more
        return raw
    finally:
        os.close(file)


def stamp(status: os.stat_result) -> str:
    """What changes with a file and not with the names of the folders around it."""
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_dev} {status.st_ino}"


def plain(text: str) -> str:
    """Text that can be printed: bytes of a file name that are no UTF-8, and control characters, are spelled out."""
    text = os.fsencode(text).decode("utf-8", "backslashreplace")
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def normal(name: str) -> str:
    """A class name in Unicode's composed form: macOS and Linux store the same name in two.

    Raises:
        DataError: for one with a control character, which would steer the terminal that it is printed on.
    """
    if any(unicodedata.category(c) == "Cc" for c in name):
        raise DataError(f"class {name!r} has a control character in its name: rename it")
    return unicodedata.normalize("NFC", plain(name)).strip()


def walk(root: Path, only: Callable[[str], bool] = lambda name: True) -> Tree:
    """The tree of a folder; links are followed.

    Args:
        only: of the folders right in ``root``, which ones to go into.

    Raises:
        DataError: for a folder that cannot be read.
    """
    tree = Tree(str(root))

    def visit(folder: str, parts: tuple[str, ...], above: tuple[tuple[int, int], ...]) -> None:
        for entry in entries(folder):
            here, where = (*parts, entry.name), entry.path
            try:
                if entry.is_dir():
                    status = entry.stat()
                    if (status.st_dev, status.st_ino) in above:
                        tree.left_out.append((here, where, LOOP))
                        continue
                    tree.folders.add(here)
                    if parts or only(entry.name):
                        visit(where, here, (*above, (status.st_dev, status.st_ino)))
                elif entry.is_file():
                    tree.members.append(Member(here, where, stamp(entry.stat()), partial(read_file, where)))
                else:
                    tree.left_out.append((here, where, BROKEN_LINK if entry.is_symlink() else NO_FILE))
            except OSError:  # a link that leads round in a circle
                tree.left_out.append((here, where, BROKEN_LINK))

    top = os.stat(root)
    visit(str(root), (), ((top.st_dev, top.st_ino),))
    return tree


def entries(folder: str) -> list[os.DirEntry]:
    """What is in a folder, sorted by name, without what is hidden.

    Raises:
        DataError: when it cannot be read.
    """
    try:
        with os.scandir(folder) as found:
            return sorted((entry for entry in found if not hidden(entry.name)), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"folder {folder} cannot be read ({error.strerror}): check it and its permissions") from error


def named(wheres: Iterable[str]) -> str:
    """Some files by name: all, or the first and how many more."""
    wheres = [plain(where) for where in wheres]
    more = f", and {len(wheres) - NAMED} more" if len(wheres) > NAMED else ""
    return ", ".join(wheres[:NAMED]) + more
