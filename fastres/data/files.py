"""Labelled images that stay in their files and are decoded whenever they are wanted."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastres.data import pixels
from fastres.data.dataset import DataError, PixelFacts
from fastres.data.decode import Fault, in_threads, reason, unreadable
from fastres.data.tree import Member, read_file


class Files:
    """Image files by number. Plain ones are kept as one array of paths, which processes share without a copy: Python
    objects would be copied page by page as each process counts its references."""

    def __init__(self, members: Sequence[Member]):
        self._members: list[Member] | np.ndarray = list(members)
        if all(isinstance(m.read, partial) and m.read.func is read_file for m in members):
            self._members = np.array([os.fsencode(m.where) for m in members])

    def __len__(self) -> int:
        return len(self._members)

    def where(self, number: int) -> str:
        """What messages call a file."""
        member = self._members[number]
        return member.where if isinstance(member, Member) else os.fsdecode(member)

    def read(self, number: int) -> bytes:
        """A file's bytes; errors as of `fastres.data.tree.read_file`."""
        member = self._members[number]
        return member.read() if isinstance(member, Member) else read_file(os.fsdecode(member))

    def subset(self, index: np.ndarray) -> Files:
        """Some of them."""
        part = Files(())
        members = self._members
        part._members = members[index] if isinstance(members, np.ndarray) else [members[number] for number in index]
        return part


@dataclass(frozen=True, eq=False)
class FileSplit:
    """Labelled images in files, all of which have been decoded once: ``facts`` are of their central squares.

    ``labels``: int64 [N]. ``side``: pixels a side of the squares. ``share``: of an image's shorter side that they show.

    Raises:
        DataError: for no image at all.
    """

    files: Files
    labels: Tensor
    side: int
    facts: PixelFacts
    share: float = 1.0

    def __post_init__(self):
        if len(self.files) == 0:
            raise DataError("a split without an image: add images to it")

    def __len__(self) -> int:
        return len(self.files)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the squares."""
        return self.side, self.side

    def subset(self, index: Tensor) -> FileSplit:
        """The images and labels at ``index``, int64 [M]."""
        numbers = index.numpy()
        part = self.files.subset(numbers), self.labels[index], self.side, self.facts.subset(numbers)
        return FileSplit(*part, self.share)

    def labelled(self, labels: Tensor) -> FileSplit:
        """The same images with other labels, int64 [N]."""
        return FileSplit(self.files, labels, self.side, self.facts, self.share)

    def open(self, number: int) -> Image.Image:
        """An image, its pixels not decoded yet.

        Raises:
            Exception: of many types, where it cannot be read.
        """
        return pixels.open_image(self.files.read(number))

    def square(self, number: int) -> np.ndarray:
        """An image's central square, uint8 [side, side, 3]; errors as of `open`."""
        return pixels.square(self.open(number), self.side, self.share)

    def sample(self, index: Tensor) -> Tensor:
        """The squares at ``index``, int64 [M], as uint8 [M, 3, side, side] in channels_last memory format.

        Raises:
            DataError: which names all files that cannot be read any more.
        """
        numbers = index.tolist()
        images = np.empty((len(numbers), self.side, self.side, 3), np.uint8)
        faults: dict[int, Fault] = {}

        def take(slot: int) -> None:
            try:
                images[slot] = self.square(numbers[slot])
            except Exception as error:  # Pillow's decoders raise many types on damaged files
                faults[slot] = Fault(self.files.where(numbers[slot]), reason(error))

        in_threads(take, len(numbers), None)
        if faults:
            raise unreadable([faults[slot] for slot in sorted(faults)])
        return torch.from_numpy(images).permute(0, 3, 1, 2)

    def digests(self) -> np.ndarray:
        """See `PixelFacts`."""
        return self.facts.digests

    def sums(self) -> tuple[list[int], list[int]]:
        """Of each channel the sum of all values and of their squares."""
        return self.facts.sums.sum(0).tolist(), self.facts.squares.sum(0).tolist()
