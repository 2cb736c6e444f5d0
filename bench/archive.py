"""Triton's cache in a few files, so that a machine that starts anew need not compile again.

Of each kernel only what a launch reads is kept, the machine code with its description, and the functions that launch:
the intermediate languages are nine tenths of the cache.
"""

from __future__ import annotations

import io
import json
import lzma
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

from fastres.atomic import atomic_write

NAME = "triton-{}.tar.xz"
LIMIT = 15 * 2**20  # bytes of a file
FILES = 3  # at most
PIECE = 40 * 2**20  # bytes before compression that go into a file, where they shrink as usual
KEPT = (".cubin", ".json", ".so")


def of(folder: Path) -> list[Path]:
    """The archives in a folder, in order."""
    return sorted(folder.glob(NAME.format("*")))


def pack(cache: Path, folder: Path) -> dict[str, int]:
    """Write the archives of a cache; the kernels that have no room are left out.

    Returns:
        Number of ``folders`` of the cache and of those ``packed``, and the ``bytes`` of the archives.
    """
    entries = [path for path in sorted(cache.iterdir()) if path.is_dir()] if cache.is_dir() else []
    left, packed, size = list(entries), 0, 0
    for number in range(FILES):
        piece, total = [], 0
        while left and total < PIECE:
            piece.append(left.pop())
            total += sum(file.stat().st_size for file in _files(piece[-1]))
        path = folder / NAME.format(number)
        content = _compressed(cache, piece) if piece else b""
        while len(content) > LIMIT:  # they shrink less than usual: half of them wait for the next file
            left += piece[len(piece) // 2 :]
            piece = piece[: len(piece) // 2]
            content = _compressed(cache, piece)
        if content:
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as file:
                file.write(content)
        else:
            path.unlink(missing_ok=True)
        packed, size = packed + len(piece), size + len(content)
    return {"folders": len(entries), "packed": packed, "bytes": size}


def unpack(archives: list[Path], cache: Path) -> int:
    """Add what archives hold to a cache at any path; the number of files. A damaged archive is left out."""
    added = 0
    for path in archives:
        try:
            with tarfile.open(path, "r:xz") as tar:
                for member in tar:
                    added += _extract(tar, member, cache)
        except (OSError, EOFError, tarfile.TarError, lzma.LZMAError) as error:
            print(f"{path} cannot be read ({error}): its kernels are compiled again", flush=True)
    return added


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, cache: Path) -> int:
    parts = Path(member.name).parts
    if not member.isfile() or len(parts) != 2 or ".." in parts or member.name.startswith("/"):
        return 0
    target = cache / member.name
    source = tar.extractfile(member)
    if source is None or target.exists():
        return 0
    content = source.read()
    if target.name.startswith("__grp__"):  # names files by their whole paths, on the machine that packed them
        names = [Path(child).name for child in json.loads(content)["child_paths"].values()]
        content = json.dumps({"child_paths": {name: str(target.parent / name) for name in names}}).encode()
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as file:
        file.write(content)
    return 1


def _compressed(cache: Path, folders: list[Path]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz", preset=1) as tar:
        for folder in folders:
            for file in _files(folder):
                tar.add(file, str(file.relative_to(cache)))
    return buffer.getvalue()


def _files(folder: Path) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_file() and entry.name.endswith(KEPT):
                yield Path(entry.path)
