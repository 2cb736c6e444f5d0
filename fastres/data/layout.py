"""Which file of a tree is of which split and class: ``{train,val,test}/CLASS/**``, or ``CLASS/**`` alone."""

from __future__ import annotations

import os
from dataclasses import dataclass

from fastres.data import pixels
from fastres.data.dataset import DataError
from fastres.data.tree import UNSAFE, Member, Tree, named, normal

SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
ALL = "all"  # the one split of a flat folder
NO_IMAGE, NO_CLASS, NEEDS_HEIF = "files without an image's suffix", "images outside a class folder", "HEIC images"
HEIF_SUFFIXES = (".heic", ".heif")


@dataclass
class Listing:
    """Image files by split and class; ``left_out``: files by the reason for which they are not read.

    Classes are sorted by name and may be without images in one split; they are the names of all splits together.
    """

    where: str
    classes: tuple[str, ...]
    splits: dict[str, list[tuple[Member, int]]]
    left_out: dict[str, list[str]]

    def said(self) -> list[str]:
        """A line for each reason for which files were left out, which counts and names them."""
        remedy = {NEEDS_HEIF: "; `pip install pillow-heif` reads them"}
        return [
            f"left out of {self.where}: {len(files)} {reason} ({named(files)}){remedy.get(reason, '')}"
            for reason, files in self.left_out.items()
        ]


def split_of(name: str) -> str | None:
    """Which split a folder is named after, in any case of letters; None: it is a class, or something else."""
    return next((split for split, names in SPLITS.items() if name.lower() in names), None)


def suffix(name: str) -> str:
    """The ending of a file name in lower case."""
    return os.path.splitext(name)[1].lower()


def split_folders(tree: Tree, base: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """The folders under ``base`` that are splits: named so, and with folders of classes in them.

    Raises:
        DataError: when two have the same meaning.
    """
    found: dict[str, tuple[str, ...]] = {}
    loose = {m.parts[:-1] for m in tree.members if len(m.parts) == len(base) + 2 and is_image(m)}
    for name in tree.children(base):
        place, split = (*base, name), split_of(name)
        if split is None or (place in loose and not tree.children(place)):
            continue
        if split in found:
            raise DataError(
                f"{tree.where} has both {'/'.join(found[split])!r} and {'/'.join(place)!r}, which mean the same: keep "
                "one"
            )
        found[split] = place
    return {split: found[split] for split in SPLITS if split in found}


def is_image(member: Member) -> bool:
    """Whether a file's name is an image's."""
    return suffix(member.parts[-1]) in pixels.suffixes()


def base_of(tree: Tree) -> tuple[str, ...]:
    """Where the splits or classes are: the tree itself, or the one folder in it, as archives often have."""
    base: tuple[str, ...] = ()
    while len(tree.children(base)) == 1 and not split_folders(tree, base):
        inner = (*base, tree.children(base)[0])
        if not tree.children(inner) or any(m.parts[:-1] == base and is_image(m) for m in tree.members):
            break
        base = inner
    return base


def arrange(tree: Tree) -> Listing:
    """Sort a tree's files into splits and classes: those of a flat tree into the split `ALL`.

    Raises:
        DataError: when the tree holds no class folder with images.
    """
    base = base_of(tree)
    splits = split_folders(tree, base)
    places = splits or {ALL: base}
    files: dict[str, list[tuple[Member, str]]] = {split: [] for split in places}
    left_out: dict[str, list[str]] = {}
    of_place = {place: split for split, place in places.items()}
    depth = len(base) + bool(splits)
    if not splits and (names := tree.children(base)) and all(split_of(name) for name in names):
        raise DataError(
            f"{tree.where}/{names[0]} has no class folders with images: make {tree.where}/{names[0]}/CLASS/IMAGE"
        )
    for member in tree.members:
        split = of_place.get(member.parts[:depth])
        if split is None:
            continue
        if not is_image(member):
            reason = NEEDS_HEIF if suffix(member.parts[-1]) in HEIF_SUFFIXES else NO_IMAGE
            left_out.setdefault(reason, []).append(member.where)
        elif len(member.parts) == depth + 1:
            left_out.setdefault(NO_CLASS, []).append(member.where)
        else:
            files[split].append((member, normal(member.parts[depth])))
    for parts, where, reason in tree.left_out:
        if reason == UNSAFE or parts[:depth] in of_place:
            left_out.setdefault(reason, []).append(where)
    found = {split: {normal(name) for name in tree.children(place)} for split, place in places.items()}
    if not splits:  # any folder may lie beside the classes
        found = {ALL: {name for _, name in files[ALL]}}
    check_classes(tree.where, {split: "/".join((tree.where, *place)) for split, place in places.items()}, found, files)
    classes = tuple(sorted(set().union(*found.values())))
    numbers = {name: number for number, name in enumerate(classes)}
    labelled = {split: [(member, numbers[name]) for member, name in part] for split, part in files.items()}
    return Listing(tree.where, classes, labelled, left_out)


def check_classes(
    where: str,
    places: dict[str, str],
    found: dict[str, set[str]],
    files: dict[str, list[tuple[Member, str]]],
) -> None:
    """Every class folder holds an image.

    Raises:
        DataError: for the first one that does not.
    """
    for split, names in found.items():
        if empty := sorted(names - {name for _, name in files[split]}):
            raise DataError(
                f"class folder {places[split]}/{empty[0]} holds no image (such as .png or .jpg; see "
                "`fastres.data.pixels.suffixes`): add some or remove it"
            )
    if not any(found.values()):
        raise DataError(f"{where} holds neither train/CLASS/IMAGE and test/CLASS/IMAGE nor CLASS/IMAGE: arrange it so")


def for_training(listing: Listing, val_share: float | None) -> Listing:
    """The listing itself, if a network can be trained and validated with it.

    Raises:
        DataError: when a split is missing, the splits' classes differ, or there are fewer than two.
    """
    where, splits = listing.where, listing.splits
    if "train" not in splits and ALL not in splits:
        raise DataError(f"image folder {where} has no folder 'train': make {where}/train/CLASS/IMAGE")
    if len(splits) == 1 and val_share is None:
        what = "is flat, CLASS/IMAGE" if ALL in splits else "has no folder 'test', nor 'val'"
        raise DataError(
            f"image folder {where} {what}: keep a part of each class for validation with --val-share 0.2, or make "
            f"{where}/{{train,val}}/CLASS/IMAGE"
        )
    if val_share is not None and "val" in splits:
        raise DataError(f"image folder {where} has a folder for validation: leave out --val-share {val_share:g}")
    if len(listing.classes) < 2:
        raise DataError(f"image folder {where} has {len(listing.classes)} class folders: at least 2 are needed")
    first = "train" if "train" in splits else ALL
    present = {split: {label for _, label in part} for split, part in splits.items()}
    for split in present:
        for one, other in ((first, split), (split, first)):
            if lacking := sorted(present[one] - present[other]):
                raise DataError(
                    f"class {listing.classes[lacking[0]]!r} is in {where}/{one} but not in {where}/{other}: "
                    "both need the same class folders"
                )
    return listing
