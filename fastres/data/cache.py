"""Decoded images kept as files that are named after the content of what was decoded, so that they are decoded once."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch

from fastres.atomic import atomic_write
from fastres.cache import remove_leftovers
from fastres.data.dataset import Parts, PixelFacts, Split, first_line
from fastres.data.size import Sides

T = TypeVar("T")
Bad = tuple[tuple[int, str], ...]  # number and fault of each file that could not be read
FORMAT = "fastres-images-4"
ENTRY = ".images.json"


def digest(*parts: str | bytes) -> str:
    """A hash of texts and bytes, in hexadecimal: another one after any change to them or to where one ends."""
    found = hashlib.sha256()
    for part in parts:
        raw = part if isinstance(part, bytes) else part.encode("utf-8", "surrogateescape")
        found.update(len(raw).to_bytes(8, "little") + raw)
    return found.hexdigest()


@dataclass(frozen=True)
class Facts:
    """What is known of files without decoding them: a hash of their content, and how large the images are."""

    content: str
    sides: Sides | None = None


@dataclass(frozen=True)
class Survey:
    """What was found when all images of a content were decoded once: of a bad one there are no facts."""

    facts: PixelFacts
    bad: Bad


class Cache:
    """A folder with decoded images and, for each place where files were, what they held.

    Files that lie in another place, or were copied, have the same content and are not decoded again. A cache file that
    is damaged or cannot be written costs a warning and the time to decode, never the run.

    Args:
        folder: where the files are; None: nothing is kept.
        say: takes a warning of one line.
    """

    def __init__(self, folder: Path | None, say: Callable[[str], None]):
        self.folder, self.say = folder, say

    def facts(self, place: str, state: str, find: Callable[[], Facts]) -> Facts:
        """What the files of a place hold.

        Args:
            place: what names it; there is one entry a place, and the images of its former content are removed.
            state: names, sizes, inodes and times of the files: where any place had the same, nothing is read.
            find: reads the files.
        """
        if self.folder is None:
            return find()
        path = self.folder / f"{digest(place)[:24]}{ENTRY}"
        entries = {
            entry: self._entry(entry) for entry in sorted(self.folder.glob(f"*{ENTRY}"), key=lambda e: e != path)
        }
        hit = next((entry for entry, content in entries.items() if content and content["state"] == state), None)
        facts = find() if hit is None else _facts(entries[hit] or {})
        former = entries.pop(path, None)
        if hit != path:
            content = {"state": state, **asdict(facts)}
            line = json.dumps({**content, "checksum": _checksum(content)}).encode()
            self._keep(path, lambda file: file.write(line))
        held = {content["content"] for content in entries.values() if content is not None} | {facts.content}
        if former is not None and former["content"] not in held:
            for old in self.folder.glob(f"{former['content'][:24]}-*.npz"):
                old.unlink(missing_ok=True)
        return facts

    def parts(self, content: str, size: str, build: Callable[[], Parts]) -> Parts:
        """The decoded images of a content in a form, from their file or from ``build``, which are then kept."""
        return self._kept(content, size, build, _arrays, _parts)

    def survey(self, content: str, size: str, build: Callable[[], Survey]) -> Survey:
        """What is known of the decoded images of a content at a size, without the images."""
        return self._kept(content, f"{size}-survey", build, _survey_arrays, _survey)

    def _kept(
        self,
        content: str,
        kind: str,
        build: Callable[[], T],
        pack: Callable[[T], dict[str, np.ndarray]],
        unpack: Callable[[dict[str, np.ndarray]], T],
    ) -> T:
        if self.folder is None:
            return build()
        path, identity = self.folder / f"{content[:24]}-{kind}.npz", f"{FORMAT} {content} {kind}"
        try:
            return unpack(_read(path, identity))
        except (FileNotFoundError, NotADirectoryError):
            pass
        except Exception as error:  # a damaged archive can raise anything
            self.say(f"warning: cache file {path} cannot be used ({first_line(error)}): decoding the images again")
        built = build()
        arrays = {"identity": np.array([identity]), **pack(built)}
        self._keep(path, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]
        return built

    def _entry(self, path: Path) -> dict[str, Any] | None:
        try:
            content = json.loads(path.read_bytes())
            if content.pop("checksum") != _checksum(content):
                raise ValueError("checksum")
            _facts(content)
            return content
        except FileNotFoundError:  # another process removed it
            return None
        except Exception as error:  # a damaged file can raise anything
            self.say(f"warning: cache file {path} cannot be used ({first_line(error)}): reading the images again")
            path.unlink(missing_ok=True)
            return None

    def _keep(self, path: Path, write: Callable[[BinaryIO], object]) -> None:
        if self.folder is None:
            return
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            remove_leftovers(path.parent)
            with atomic_write(path) as file:
                write(file)
        except OSError as error:
            self.say(f"warning: cannot keep decoded images in {path.parent} ({first_line(error)}): going on without")
            self.folder = None  # one warning is enough


def _checksum(content: dict[str, Any]) -> str:
    return digest(FORMAT, json.dumps(content, sort_keys=True))


def _facts(content: dict[str, Any]) -> Facts:
    sides = content["sides"]
    return Facts(content["content"], None if sides is None else Sides(**sides))


def _arrays(parts: Parts) -> dict[str, np.ndarray]:
    arrays = {
        "genuine": np.array(parts.genuine),
        "classes": np.array(parts.classes),
        "statistics": np.array([parts.mean, parts.std]),
        **_fault_arrays(parts.bad),
        "splits": np.array(list(parts.splits)),
    }
    for name, split in parts.splits.items():
        assert isinstance(split, Split)  # what is in files need not be kept
        arrays[f"{name}_images"] = split.images.permute(0, 2, 3, 1).numpy()
        arrays[f"{name}_labels"] = split.labels.numpy()
        arrays[f"{name}_digests"] = split.digests()  # which would take longer than to read the images
    return arrays


def _parts(arrays: dict[str, np.ndarray]) -> Parts:
    splits = {
        name: Split(torch.from_numpy(arrays[f"{name}_images"]).permute(0, 3, 1, 2),
                    torch.from_numpy(arrays[f"{name}_labels"]), arrays[f"{name}_digests"])
        for name in arrays["splits"].tolist()
    }  # fmt: skip
    mean, std = arrays["statistics"].tolist()
    classes, genuine = tuple(arrays["classes"].tolist()), bool(arrays["genuine"])
    return Parts(dict(splits), classes, tuple(mean), tuple(std), _faults(arrays), genuine)


def _survey_arrays(found: Survey) -> dict[str, np.ndarray]:
    return {**asdict(found.facts), **_fault_arrays(found.bad)}


def _survey(arrays: dict[str, np.ndarray]) -> Survey:
    return Survey(PixelFacts(arrays["digests"], arrays["sums"], arrays["squares"]), _faults(arrays))


def _fault_arrays(bad: Bad) -> dict[str, np.ndarray]:
    return {
        "bad": np.array([number for number, _ in bad], np.int64),
        "reasons": np.array([reason for _, reason in bad], np.str_),
    }


def _faults(arrays: dict[str, np.ndarray]) -> Bad:
    return tuple(zip(arrays["bad"].tolist(), arrays["reasons"].tolist()))


def _read(path: Path, identity: str) -> dict[str, np.ndarray]:
    """The arrays in a file; any exception but that there is none means damage."""
    with zipfile.ZipFile(path) as archive:
        if bad := archive.testzip():
            raise ValueError(f"checksum of {bad}")
    with np.load(path, allow_pickle=False) as arrays:
        if arrays["identity"].tolist() != [identity]:
            raise ValueError("it is of other images")
        return {name: arrays[name] for name in arrays.files}
