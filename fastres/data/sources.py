"""Where labelled images come from: CIFAR, a folder, an archive or a table of images, or the built-in drawn set."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from fastres.cache import cache_folder
from fastres.data import cifar, decode, layout, table
from fastres.data.archive import SUFFIXES as ARCHIVES
from fastres.data.archive import is_archive, open_archive
from fastres.data.budget import Budget, in_gib, memory_budget, square_bytes
from fastres.data.cache import Cache, Facts, Survey, digest
from fastres.data.dataset import DataError, Dataset, Labelled, Parts, Split, divide, make_dataset, make_parts
from fastres.data.files import Files, FileSplit
from fastres.data.published import read_folder
from fastres.data.registry import CIFAR10, DATASETS
from fastres.data.size import LARGE, Sides, seen_side, stored_side
from fastres.data.tree import Member, entries, named, normal, plain, walk

logger = logging.getLogger(__name__)
SOURCES = ("auto", *DATASETS)


@dataclass(frozen=True)
class Found:
    """What a source holds, what it is called, and the size at which its images are meant to be seen; None: any."""

    parts: Parts
    label: str
    image_size: int | None = None


@dataclass(frozen=True)
class Wanted:
    """What is asked of a source.

    image_size: pixels a side that the images are to be seen at; None: the rule of `fastres.data.size` decides.
    stored: pixels a side that a folder's images are decoded to, at most; None: what `stored_side` says.
    val_share: share of each class that is kept from training for validation.
    skip_bad: go on without the files that cannot be read.
    training: whether there must be what a network can be trained and validated with.
    budget: of the memory for a folder's decoded images; None: the host's, see `fastres.data.budget`.
    from_files: leave a folder's images in their files whatever they take, so that they can be had at their full size.
    center_share: of an image's shorter side, which its central square has.
    """

    image_size: int | None = None
    stored: int | None = None
    val_share: float | None = None
    skip_bad: bool = False
    training: bool = True
    budget: Budget | None = None
    from_files: bool = False
    center_share: float = 1.0


class Loader:
    """Reads any source, through one cache and with one way to speak."""

    def __init__(self, wanted: Wanted, cache: Cache, say: Callable[[str], None]):
        self.wanted, self.cache, self.say = wanted, cache, say

    def batches(self, path: Path, kind: cifar.Kind, place: Path | None = None) -> Found:
        """A ``cifar-10-batches-py`` or ``cifar-100-python`` folder; only with its checksums has it the set's name.

        Args:
            place: where they come from, if not from ``path``.
        """
        parts = read_folder(path, kind, self.cache, place)
        name = plain((place or path).resolve().name)
        return Found(parts, kind.name if parts.genuine else f"batches {name} ({len(parts.splits['train'])} images)")

    def archive(self, path: Path) -> Found:
        """An image folder, images with a table, or one of CIFAR's sets, in a zip or tar file."""
        tree = open_archive(path)
        for kind in cifar.KINDS:
            files = {
                m.parts[-1]: m for m in tree.members if m.parts[-2:-1] == (kind.folder,) and m.parts[-1] in kind.files
            }
            if files:
                with tempfile.TemporaryDirectory() as folder:
                    for name, member in files.items():  # names that are known: nothing is written elsewhere
                        (Path(folder) / name).write_bytes(member.read())
                    return self.batches(Path(folder), kind, path)
        has_splits = layout.split_folders(tree, layout.base_of(tree))
        if not has_splits and (tables := table.tables_of(tree)):
            return self.listed(table.read_tables(tables, path), path)
        return self.listed(layout.arrange(tree), path)

    def image_folder(self, path: Path) -> Found:
        """An image folder: ``PATH/{train,val,test}/CLASS/**`` or ``PATH/CLASS/**``."""
        splits = has_splits(path)
        tree = walk(path, (lambda name: layout.split_of(name) is not None) if splits else (lambda name: True))
        return self.listed(layout.arrange(tree), path)

    def listed(self, listing: layout.Listing, path: Path) -> Found:
        """The images of a listing, decoded or from the cache."""
        for line in listing.said():
            self.say(line)
        if self.wanted.training:
            layout.for_training(listing, self.wanted.val_share)
        members = [member for part in listing.splits.values() for member, _ in part]
        labelled = [(split, label) for split, part in listing.splits.items() for _, label in part]
        names = [f"{split} {listing.classes[label]}" for split, label in labelled]
        looks: list[decode.Look] | None = None
        allowed = self.wanted.budget or memory_budget()

        def find() -> Facts:
            nonlocal looks
            at_most = square_bytes(len(members), self.wanted.stored or self.wanted.image_size or LARGE)
            if at_most > allowed.bytes:  # said before the work that takes long
                line = f"{listing.where}: {len(members)} images, decoded at most {in_gib(at_most)}"
                self.say(f"{line}; the budget is {allowed}")
            looks = decode.look_at(members, desc="reading")
            sides = [look.side for look in looks if look.fault is None]
            if not sides:
                raise decode.unreadable([decode.Fault(m.where, look.fault or "") for m, look in zip(members, looks)])
            content = digest(*(part for name, look in zip(names, looks) for part in (name, look.digest)))
            return Facts(content, Sides.of(sides))

        state = digest(*(f"{name} {'/'.join(m.parts)} {m.stamp}" for name, m in zip(names, members)))
        facts = self.cache.facts(str(path.resolve()), state, find)
        assert facts.sides is not None
        seen = seen_side(facts.sides, self.wanted.image_size)
        share = self.wanted.center_share
        size = stored_side(facts.sides, seen, share) if self.wanted.stored is None else self.wanted.stored
        form = f"{size}" if share == 1 else f"{size}-{share:g}"
        why = "" if self.wanted.image_size else "; --image-size takes another size"
        self.say(f"{listing.where}: {len(members)} images of {facts.sides}, taken at {seen}x{seen}{why}")
        needed = square_bytes(len(members), size)
        if self.wanted.from_files or needed > allowed.bytes:
            verdict = f"more than the budget of {allowed}" if needed > allowed.bytes else "wanted at their full size"
            self.say(f"decoded they take {in_gib(needed)}, {verdict}: streamed from their files")
            found = self.cache.survey(facts.content, form, lambda: surveyed(members, looks, size, share))
            parts = in_files(listing, found, size, share)
        else:
            parts = self.cache.parts(facts.content, form, lambda: decoded(listing, looks, size, share))
        self.skip([decode.Fault(members[number].where, reason) for number, reason in parts.bad])
        first = next(iter(parts.splits.values()))
        lacking = set(range(len(listing.classes))) - set(first.labels.tolist())
        if self.wanted.training and lacking:
            raise DataError(
                f"class {listing.classes[min(lacking)]!r} has no image that can be read in {listing.where}: add some "
                "or remove its folder"
            )
        return Found(parts, f"image folder {plain(path.resolve().name)} ({len(first)} images)", seen)

    def skip(self, faults: list[decode.Fault]) -> None:
        """Name the files that cannot be read.

        Raises:
            DataError: unless they are to be skipped.
        """
        if faults and not self.wanted.skip_bad:
            raise decode.unreadable(faults)
        if faults:
            self.say(f"left out: {len(faults)} unreadable images ({named(f'{f.where}: {f.reason}' for f in faults)})")

    def named(self, name: str, root: Path) -> Found:
        """A set of `fastres.data.registry`."""
        found = DATASETS[name]
        return Found(found.load(root, self.cache, self.say), found.label)

    def path(self, path: Path) -> Found:
        """What lies at a path: images in a folder, an archive or a table, or CIFAR's batches there or under it."""
        if path.is_file() and is_archive(path):
            return self.archive(path)
        if path.is_file() and path.suffix.lower() in table.SUFFIXES:
            return self.listed(table.read_tables([table.in_folder(path)], path), path)
        if not path.is_dir():
            what = (
                "neither a folder nor one of " + " ".join((*ARCHIVES, *table.SUFFIXES))
                if path.exists()
                else "not there"
            )
            raise DataError(f"data {str(path)!r} is {what}: give {', '.join(SOURCES)} or an existing folder")
        if not has_splits(path):
            for kind in cifar.KINDS:
                for batches in (path, path / kind.folder):
                    if kind.is_in(batches):
                        return self.batches(batches, kind)
            tables = table.tables_in(path)
            if tables:
                return self.listed(table.read_tables(tables, path), path)
        return self.image_folder(path)

    def auto(self, root: Path) -> Found:
        """The first source that is there, with a word on those before it that are not.

        One that is there but damaged is an error: falling through would train on other data than was meant.
        """
        missing = []
        try:
            found = self.named(CIFAR10, root)
        except DataError as error:
            missing.append(str(error))
            if has_splits(root):
                found = self.image_folder(root)
            elif cifar.CIFAR10.is_in(root / cifar.CIFAR10.folder):
                missing.append(f"no image folder {root}/{{train,test}}/CLASS")
                found = self.batches(root / cifar.CIFAR10.folder, cifar.CIFAR10)
            else:
                missing += [f"no image folder {root}/{{train,test}}/CLASS", f"no {root / cifar.CIFAR10.folder}"]
                found = self.named("synthetic", root)
        self.say("; ".join([f"data: {found.label}", *(f"not taken: {reason}" for reason in missing)]))
        return found

    def find(self, source: str | os.PathLike, root: Path) -> Found:
        """Any source by name or path."""
        if source == "auto":
            return self.auto(root)
        return self.named(str(source), root) if str(source) in DATASETS else self.path(Path(source))


def decoded(listing: layout.Listing, looks: list[decode.Look] | None, size: int, share: float) -> Parts:
    """The images of a listing at ``size``, in memory."""
    members = [member for part in listing.splits.values() for member, _ in part]
    images, faults = decode.decode(members, looks, size, "decoding", share)

    def split(numbers: np.ndarray, labels: torch.Tensor) -> Split:
        start, stop = int(numbers[0]), int(numbers[-1]) + 1
        chosen = images[start:stop] if stop - start == len(numbers) else images[numbers]
        return Split(torch.from_numpy(chosen).permute(0, 3, 1, 2), labels)

    return parted(listing, tuple((number, fault.reason) for number, fault in faults.items()), split)


def surveyed(members: list[Member], looks: list[decode.Look] | None, size: int, share: float) -> Survey:
    """What is found when all images are decoded once, and let go."""
    facts, faults = decode.survey(members, looks, size, "looking through", share)
    return Survey(facts, tuple((number, fault.reason) for number, fault in faults.items()))


def in_files(listing: layout.Listing, found: Survey, size: int, share: float) -> Parts:
    """The images of a listing at ``size``, in their files."""
    files = Files([member for part in listing.splits.values() for member, _ in part])

    def split(numbers: np.ndarray, labels: torch.Tensor) -> FileSplit:
        return FileSplit(files.subset(numbers), labels, size, found.facts.subset(numbers), share)

    return parted(listing, found.bad, split)


def parted(
    listing: layout.Listing,
    bad: tuple[tuple[int, str], ...],
    make: Callable[[np.ndarray, torch.Tensor], Labelled],
) -> Parts:
    """The parts of a listing, each made of the numbers and labels of its good images; one without any is left out."""
    faulty, splits, start = {number for number, _ in bad}, {}, 0
    for name, part in listing.splits.items():
        good = [number for number in range(start, start + len(part)) if number not in faulty]
        if good:
            splits[name] = make(np.array(good), torch.tensor([part[number - start][1] for number in good]))
        start += len(part)
    return make_parts(splits, listing.classes, bad)


def has_splits(path: Path) -> bool:
    """Whether a folder holds one that is named after a split and has folders in it, complete or not."""
    if not path.is_dir():
        return False
    splits = [path / name for name in os.listdir(path) if layout.split_of(name) and (path / name).is_dir()]
    return any(entry.is_dir() for split in splits for entry in entries(str(split)))


def load(
    source: str | os.PathLike = "auto",
    root: str | os.PathLike = "data",
    image_size: int | None = None,
    cache: bool | str | os.PathLike = True,
    say: Callable[[str], None] = logger.warning,
    val_share: float | None = None,
    val_seed: int = 0,
    skip_bad: bool = False,
    budget: Budget | None = None,
    from_files: bool = False,
    center_share: float | None = None,
    of_photos_alone: bool = False,
) -> Dataset:
    """Load labelled images to train with.

    Args:
        source: ``cifar10``, ``cifar100``: as published, from ``root``, else downloaded to it by torchvision.
            ``synthetic``: ten drawn shapes, built in. A path: an image folder ``PATH/{train,val,test}/CLASS/**`` or
            ``PATH/CLASS/**``; a zip or tar archive of one; a CSV file with the columns file, label and, if you like,
            split; ``cifar-10-batches-py``, ``cifar-100-python`` or the folder it is in. ``auto``: the first that is
            there of CIFAR-10, an image folder ``root``, ``root/cifar-10-batches-py`` and the synthetic set; ``say``
            hears which one and why not those before it.
        root: where ``auto``, ``cifar10`` and ``cifar100`` look.
        image_size: side in pixels that an image folder's images are to be seen at; None: their median shorter side, or
            224 where that is less. They are decoded to it, or to what the largest has where that is less. CIFAR-10
            and the synthetic set always have 32, see `Augment.resize`.
        cache: keep decoded images in the cache folder, or in this folder, or not at all.
        say: takes one line: what was chosen, its size, what was left out, downloads, warnings.
        val_share: share of each class's training images that is kept from training to pick the best epoch; a test set
            then picks nothing. A folder without one needs it.
        val_seed: which images these are.
        skip_bad: go on without the files that cannot be read.
        budget: memory for a folder's decoded images; larger sets are `FileSplit`s, whose pixels, statistics and digest
            are the same. None: a third of the host's free memory.
        from_files: a folder's training images are in a `FileSplit` in any case, which has them at their full size too.
        center_share: part of a photo's shorter side that its central square has, such as 224 / 256; None: all of it.
        of_photos_alone: images of no photos in files, such as CIFAR-10's, are seen whole; else a share of them is an
            error.

    Raises:
        DataError: when the source is missing or damaged; the message names the files and the remedy.
    """
    share = 1.0 if center_share is None else center_share
    loader = _loader(Wanted(image_size, None, val_share, skip_bad, True, budget, from_files, share), cache, say)
    found = loader.find(source, Path(root))
    of_photos = found.image_size is not None
    if share != 1 and not of_photos and not of_photos_alone:
        raise DataError(f"--center-share {share:g} is of photos in files, not of {found.label}: leave it out")
    dataset = _dataset(found, val_share, val_seed, from_files, budget or memory_budget())
    return replace(dataset, center_share=share if of_photos else None)


def _loader(wanted: Wanted, cache: bool | str | os.PathLike, say: Callable[[str], None]) -> Loader:
    for size in (wanted.image_size, wanted.stored):
        if size is not None and size < 1:
            raise DataError(f"image size {size} must be at least 1 pixel")
    if wanted.val_share is not None and not 0 < wanted.val_share < 1:
        raise DataError(f"--val-share {wanted.val_share:g} is not between 0 and 1: give a share such as 0.2")
    folder = cache_folder() if cache is True else None if cache is False else Path(cache)
    return Loader(wanted, Cache(folder, say), say)


def held(split: Labelled, allowed: Budget) -> Labelled:
    """A split in memory, if the budget has room: what is seen in each epoch alike need not be decoded again."""
    if isinstance(split, Split) or square_bytes(len(split), split.size[0]) > allowed.bytes:
        return split
    return Split(split.sample(torch.arange(len(split))), split.labels)


def _dataset(found: Found, val_share: float | None, val_seed: int, from_files: bool, allowed: Budget) -> Dataset:
    parts, label = found.parts, found.label
    splits = dict(parts.splits)
    train = splits.pop("train", None) or splits.pop(layout.ALL)
    val, test = splits.get("val"), splits.get("test")
    if val_share is not None:
        train, val = divide(train, val_share, val_seed, parts.classes)
        label += f", {len(val)} of {len(train) + len(val)} kept for validation"
    if test is None:
        val, test = None, val
    if test is None:
        raise DataError(f"{label}: no image for validation can be read: replace them")
    if from_files:
        val, test = None if val is None else held(val, allowed), held(test, allowed)
    if val_share is not None:
        return make_dataset(train, test, parts.classes, label, val, found.image_size).forgetting()
    return Dataset(train, test, parts.classes, label, parts.mean, parts.std, val, found.image_size).forgetting()


def load_test(
    source: str | os.PathLike,
    root: str | os.PathLike,
    classes: Sequence[str],
    image_size: int,
    stored_size: int,
    cache: bool | str | os.PathLike = True,
    say: Callable[[str], None] = logger.warning,
    val_share: float | None = None,
    val_seed: int = 0,
    skip_bad: bool = False,
    budget: Budget | None = None,
    center_share: float = 1.0,
) -> tuple[Labelled, str]:
    """Labelled images to evaluate a trained network with, and what they are called.

    They are the source's split for tests, else that for validation; of a flat folder all images, or with ``val_share``
    those that `load` kept for validation. Not every class need have images.

    Args:
        classes: of the network, which the labels count.
        image_size: pixels a side that the network sees.
        stored_size: pixels a side that its training images were decoded to.
        others: see `load`.

    Raises:
        DataError: see `load`; also for a class that the network does not know.
    """
    loader = _loader(Wanted(image_size, stored_size, None, skip_bad, False, budget, False, center_share), cache, say)
    found = loader.find(source, Path(root))
    splits, label = found.parts.splits, found.label
    known = {normal(name): number for number, name in enumerate(classes)}
    if unknown := [name for name in found.parts.classes if normal(name) not in known]:
        raise DataError(
            f"the network tells apart {', '.join(classes)}, but {label} has the class {unknown[0]!r}: name the data it "
            "was trained for with --data"
        )
    part = splits.get("test") or splits.get("val")
    if part is None and val_share is not None:
        part = divide(next(iter(splits.values())), val_share, val_seed, found.parts.classes)[1]
        label += f", {len(part)} kept for validation"
    if part is None:
        if "train" in splits:
            raise DataError(f"{label} has no images for tests: add a folder 'test' or name another one with --data")
        part = splits[layout.ALL]
    numbers = torch.tensor([known[normal(name)] for name in found.parts.classes])
    return part.labelled(numbers[part.labels]), label
