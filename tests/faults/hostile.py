"""Folders in which a run must not start or go on: somebody's files, another run's, links, pipes, missing files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from fastres.train.identity import checksum

Make = Callable[[Path, Path, Path], object]  # of a folder, another run's folder, and a file that is somebody's


def _write(name: str, text: str = "precious") -> Make:
    return lambda folder, run, mine: (folder / name).write_text(text)


def _link(name: str, to: str) -> Make:
    def make(folder: Path, run: Path, mine: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(mine if to == "mine" else to)

    return make


def _pipe(name: str) -> Make:
    def make(folder: Path, run: Path, mine: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return make


def _drop(*names: str) -> Make:
    def make(folder: Path, run: Path, mine: Path) -> None:
        for name in names:
            (folder / name).unlink(missing_ok=True)

    return make


def _others(name: str) -> Make:
    return lambda folder, run, mine: shutil.copy(run / name, folder / name)


def _edited(folder: Path, run: Path, mine: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    content["options"]["lr"] = 0.07
    content["checksum"] = checksum({key: value for key, value in content.items() if key != "checksum"})
    (folder / "config.json").write_text(json.dumps(content))


# what is done to an empty folder: no run may start there
STRANGE: dict[str, Make] = {
    "somebody's config.json": _write("config.json", '{"mine": 1}'),
    "somebody's metrics.jsonl": _write("metrics.jsonl"),
    "somebody's notes": _write("notes.txt"),
    "somebody's temporary file": _write(".notes.tmp"),
    "a lock that is a link": _link(".lock", "mine"),
    "a lock that is a loop": _link(".lock", ".lock"),
    "a lock that is a pipe": _pipe(".lock"),
    "a checkpoint that leads nowhere": _link("last.pt", "nowhere"),
}
# what is done to a run's folder, beside another run of the same options: it may not go on there
CHANGED: dict[str, Make] = {
    "another run's last.pt": _others("last.pt"),
    "another run's best.pt": _others("best.pt"),
    "another run's config.json": _others("config.json"),
    "an edited config.json": _edited,
    "no checkpoint": _drop("last.pt", "previous.pt"),
    "no checkpoint beside metrics alone": _drop("last.pt", "previous.pt", "best.pt"),
    "a checkpoint that leads nowhere": _link("last.pt", "nowhere"),
    "a lock that is a link": _link(".lock", "mine"),
    "a config.json that is a pipe": _pipe("config.json"),
    "a last.pt that is a pipe": _pipe("last.pt"),
}


def state(folder: Path) -> dict[str, bytes | str]:
    """Every file of a folder but the lock, by name: content, link or kind."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.iterdir()):
        if path.is_symlink():
            found[path.name] = os.readlink(path)
        elif path.is_file():
            found[path.name] = path.read_bytes()
        else:
            found[path.name] = "no file"
    return {name: value for name, value in found.items() if name != ".lock" or isinstance(value, str)}
