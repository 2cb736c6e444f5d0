"""Image files to pixels, in parallel threads: first what size they have, then their central squares."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastres.data import pixels
from fastres.data.dataset import DataError, PixelFacts, first_line
from fastres.data.tree import Member, plain, read_file

T = TypeVar("T")
TASK = 64  # images that a thread takes at a time
KEPT = 1 << 30  # bytes of such pixels that are kept at once


@dataclass
class Look:
    """What the first look at a file found: its shorter side and the hash of its bytes, or why it is no image.

    ``small``: RGB pixels of a small image, uint8 [H, W, 3].
    """

    side: int = 0
    digest: bytes = b""
    fault: str | None = None
    small: np.ndarray | None = None


@dataclass(frozen=True)
class Fault:
    """A file that is no image, or a damaged one."""

    where: str
    reason: str


def read_image(path: str | os.PathLike, size: int, share: float = 1.0) -> np.ndarray:
    """One image as uint8 [size, size, 3]: upright, RGB, central square, bilinear with antialiasing.

    Raises:
        DataError: when the file is missing, truncated or not an image.
    """
    try:
        return pixels.square(pixels.open_image(read_file(os.fspath(path))), size, share)
    except Exception as error:  # Pillow's decoders raise many types on damaged files
        raise unreadable([Fault(os.fspath(path), reason(error))]) from error


def read_images(paths: Sequence[str | os.PathLike], size: int, desc: str | None = None, share: float = 1.0) -> Tensor:
    """Images as uint8 [N, 3, size, size], channels_last, decoded in parallel threads; see `read_image`.

    Args:
        paths: image files.
        size: side in pixels.
        desc: what a progress bar on a terminal is called; None: no bar.
        share: of an image's shorter side, which its central square has.

    Raises:
        DataError: which names all files that cannot be read.
    """
    members = [Member((), os.fspath(path), "", partial(read_file, os.fspath(path))) for path in paths]
    images, faults = decode(members, None, size, desc, share)
    if faults:
        raise unreadable(list(faults.values()))
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def look_at(members: Sequence[Member], desc: str | None = None) -> list[Look]:
    """Open every file: its size, its hash, and the pixels of small images, which cost no more than to open it again."""
    room = KEPT

    def look(number: int) -> Look:
        nonlocal room
        found = Look()
        try:
            raw = members[number].read()
            found.digest = hashlib.sha256(raw).digest()
            image = pixels.open_image(raw)
            found.side = min(image.size)
            if image.width * image.height <= pixels.SMALL and room > 0:
                small = np.asarray(pixels.upright_rgb(image))
                room -= small.nbytes  # roughly: other threads do so at the same time
                found.small = small
        except Exception as error:  # Pillow's decoders raise many types on damaged files
            found.fault = reason(error)
        return found

    return in_threads(look, len(members), desc)


def decode(
    members: Sequence[Member], looks: Sequence[Look] | None, size: int, desc: str | None = None, share: float = 1.0
) -> tuple[np.ndarray, dict[int, Fault]]:
    """Central squares as uint8 [N, size, size, 3], and by number the files that have none.

    Args:
        looks: what `look_at` found, whose pixels are taken and let go.
        share: of an image's shorter side, which its central square has.

    Raises:
        DataError: where they need more memory than the machine has.
    """
    needed, memory = len(members) * size * size * 3, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise DataError(
            f"{len(members)} images of {size} pixels a side take {needed / 2**30:.0f} GiB, the machine has "
            f"{memory / 2**30:.0f}: lower --image-size or give fewer images"
        )
    images = np.empty((len(members), size, size, 3), np.uint8)
    return images, squares(members, looks, size, images.__setitem__, desc, share)


def survey(
    members: Sequence[Member], looks: Sequence[Look] | None, size: int, desc: str | None = None, share: float = 1.0
) -> tuple[PixelFacts, dict[int, Fault]]:
    """What identity and statistics need of all central squares, which are not kept, and the files that have none; see
    `decode`.
    """
    facts = PixelFacts.empty(len(members))
    return facts, squares(members, looks, size, facts.note, desc, share)


def squares(
    members: Sequence[Member],
    looks: Sequence[Look] | None,
    size: int,
    use: Callable[[int, np.ndarray], None],
    desc: str | None = None,
    share: float = 1.0,
) -> dict[int, Fault]:
    """Decode central squares in parallel threads, each of which gives them to ``use``; see `decode`."""
    faults = {}

    def take(number: int) -> None:
        member, look = members[number], looks[number] if looks is not None else Look()
        try:
            if look.fault is not None:
                raise ValueError(look.fault)
            if look.small is not None:
                square, look.small = pixels.cropped(look.small, size, share), None
            else:
                square = pixels.square(pixels.open_image(member.read()), size, share)
        except Exception as error:  # Pillow's decoders raise many types on damaged files
            faults[number] = Fault(member.where, reason(error))
        else:
            use(number, square)

    in_threads(take, len(members), desc)
    return dict(sorted(faults.items()))


def reason(error: BaseException) -> str:
    """Why a file cannot be read, in a few words."""
    if isinstance(error, FileNotFoundError):
        return "it does not exist"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error).replace(" <_io.BytesIO object", "").split(" at 0x")[0]


def unreadable(faults: Sequence[Fault]) -> DataError:
    """The error that names every file that cannot be read."""
    if len(faults) == 1:
        where, why = plain(faults[0].where), faults[0].reason
        if why == "it does not exist":
            return DataError(f"image {where} does not exist: check its name")
        return DataError(
            f"image {where} cannot be read ({why}): replace or remove it, or go on without it with --skip-bad"
        )
    listed = ", ".join(f"{plain(fault.where)} ({fault.reason})" for fault in faults)
    return DataError(
        f"{len(faults)} images cannot be read: {listed}: replace or remove them, or go on without them with --skip-bad"
    )


def in_threads(function: Callable[[int], T], count: int, desc: str | None) -> list[T]:
    """``function`` of 0 to ``count - 1``, in order, with a progress bar on a terminal where it has a name."""

    def task(start: int) -> list[T]:
        return [function(number) for number in range(start, min(start + TASK, count))]

    results: list[T] = []
    workers = ThreadPoolExecutor(os.cpu_count())
    try:
        disable = None if desc else True  # None: where there is no terminal
        with warnings.catch_warnings(), tqdm(total=count, desc=desc, unit="image", leave=False, disable=disable) as bar:
            warnings.simplefilter("ignore")  # Pillow's on large images and damaged EXIF; what it cannot read it raises
            starts = range(0, count, TASK)
            try:
                tasks = workers.map(task, starts)
            except RuntimeError:  # the user may have no further thread: this one does it
                tasks = map(task, starts)
            for done in tasks:
                results += done
                bar.update(len(done))
    finally:
        workers.shutdown(cancel_futures=True)
    return results
