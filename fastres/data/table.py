"""CSV files that name images and their classes: a line an image, with a column for the file and one for the label."""

from __future__ import annotations

import csv
import os
import posixpath
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from fastres.data.dataset import DataError
from fastres.data.layout import ALL, SPLITS, Listing, split_of
from fastres.data.tree import Member, Tree, normal, read_file, stamp

T = TypeVar("T")
SUFFIXES = (".csv", ".tsv")
COLUMNS = {  # what a heading may be called, in lower case
    "file": {
        "file",
        "filename",
        "file_name",
        "path",
        "filepath",
        "file_path",
        "image",
        "image_path",
        "img",
        "image_id",
        "id",
    },
    "label": {"label", "labels", "class", "class_name", "category", "target", "breed", "species"},
    "split": {"split", "set", "subset", "partition"},
}
ENDINGS = ("", ".jpg", ".png", ".jpeg")  # where a table has the names without them
REPEATED, UNLABELLED = "lines that repeat a file", "tables without labels"


@dataclass(frozen=True)
class Table:
    """A table in a folder or in an archive.

    ``where``: what messages call it. ``stem``: its name without suffix. ``read``: its bytes. ``member``: the file of a
    name in it, which fails when it is read and has no stamp where there is none.
    """

    where: str
    stem: str
    read: Callable[[], bytes]
    member: Callable[[str], Member]


def read_tables(tables: Iterable[Table], where: Path) -> Listing:
    """The images of one table, or of several that are named after splits.

    A file is looked for beside its table, in the folder of the table's name, and in ``images``. Labels that are all
    whole numbers are sorted as numbers.

    Raises:
        DataError: for a table that is no table of files and labels; the message names the line.
    """
    labelled: dict[str, tuple[str, str]] = {}  # by file: label and split
    members: dict[str, Member] = {}
    left_out: dict[str, list[str]] = {}
    tables = list(tables)
    for table in tables:
        if len(tables) > 1 and is_unlabelled(table):
            left_out.setdefault(UNLABELLED, []).append(table.where)
            continue
        for line, member, label, split in read_rows(table):
            file = member.where
            if file in labelled and labelled[file] != (label, split):
                raise DataError(
                    f"{table.where}, line {line}: {file} is {label!r} in {split!r} here and {labelled[file][0]!r} in "
                    f"{labelled[file][1]!r} above: keep one of the lines"
                )
            if file in labelled:
                left_out.setdefault(REPEATED, []).append(f"{table.where}, line {line}")
            labelled[file], members[file] = (label, split), member
    names = {label for label, _ in labelled.values()}
    numeric = all(name.isdecimal() for name in names)
    classes = tuple(sorted(names, key=lambda name: (int(name) if numeric else 0, name)))
    numbers = {name: number for number, name in enumerate(classes)}
    splits: dict[str, list[tuple[Member, int]]] = {}
    for split in (*SPLITS, ALL):
        if part := [(members[file], numbers[label]) for file, (label, kind) in labelled.items() if kind == split]:
            splits[split] = part
    if len(splits) > 1 and ALL in splits:
        raise DataError(f"{where} has a split for some files and none for others: give every line one")
    return Listing(str(where), classes, splits, left_out)


def in_folder(path: Path) -> Table:
    """A table that is a file."""
    return Table(str(path), path.stem, path.read_bytes, partial(_file, path))


def tables_in(folder: Path) -> list[Table]:
    """The tables of a folder that are named after splits, else its only one, else none.

    Where folders could be classes, only the names of splits make tables of the files beside them.
    """
    inside = list(folder.iterdir())
    tables = sorted(path for path in inside if path.suffix.lower() in SUFFIXES and path.is_file())
    classes = sum(path.is_dir() for path in inside)
    return [in_folder(path) for path in _chosen(tables, lambda path: path.stem, classes)]


def tables_of(tree: Tree) -> list[Table]:
    """The same of an archive, in the uppermost of its folders that has one."""
    found = [member for member in tree.members if os.path.splitext(member.parts[-1])[1].lower() in SUFFIXES]
    place = min((member.parts[:-1] for member in found), key=len, default=())
    tables = [member for member in found if member.parts[:-1] == place]
    files = {member.parts: member for member in tree.members}
    return [
        Table(member.where, stem_of(member), member.read, partial(_packed, tree, files, place, stem_of(member)))
        for member in _chosen(tables, stem_of, len(tree.children(place)))
    ]


def stem_of(member: Member) -> str:
    """A file's name without its suffix."""
    return os.path.splitext(member.parts[-1])[0]


def _chosen(tables: list[T], stem: Callable[[T], str], classes: int) -> list[T]:
    named = [table for table in tables if split_of(stem(table))]
    return named or (tables if len(tables) == 1 and classes < 2 else [])


def _places(stem: str) -> tuple[str, ...]:
    """Folders in which a table's files are looked for, from its own."""
    return "", stem, "images"


def _file(table: Path, name: str) -> Member:
    ways = [os.path.join(table.parent, folder, name + ending) for ending in ENDINGS for folder in _places(table.stem)]
    path = next((way for way in ways if os.path.isfile(way)), ways[0])
    try:
        mark = stamp(os.stat(path))
    except OSError:
        mark = ""
    return Member((path,), path, mark, partial(read_file, path))


def _packed(
    tree: Tree, files: Mapping[tuple[str, ...], Member], place: tuple[str, ...], stem: str, name: str
) -> Member:
    def way(folder: str, ending: str) -> tuple[str, ...]:
        joined = posixpath.normpath(posixpath.join(*place, folder, name.replace("\\", "/") + ending))
        return tuple(part for part in joined.split("/") if part)

    ways = [way(folder, ending) for ending in ENDINGS for folder in _places(stem)]
    where = "/".join((tree.where, *ways[0]))
    lost = Member(ways[0], where, "", partial(_lost, where))
    return next((files[parts] for parts in ways if parts in files), lost)


def _lost(where: str) -> bytes:
    raise FileNotFoundError(where)


def lines_of(table: Table) -> list[tuple[int, list[str]]]:
    """Number and cells of each line of a table that has any.

    Raises:
        DataError: for what is no text in UTF-8, or no table.
    """
    try:
        text = table.read().decode("utf-8-sig")
        delimiter = max(",;\t", key=text.partition("\n")[0].count)
        rows = enumerate(csv.reader(text.splitlines(), delimiter=delimiter), 1)
        return [(number, row) for number, row in rows if any(row)]
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"table {table.where} cannot be read ({error}): save it as CSV in UTF-8") from error


def is_unlabelled(table: Table) -> bool:
    """Whether a table names files to predict, as contests have them: one of tests, with files and without labels."""
    heading = next((row for _, row in lines_of(table)), [])
    names = {name.strip().lower() for name in heading}
    return split_of(table.stem) == "test" and bool(names & COLUMNS["file"]) and not names & COLUMNS["label"]


def read_rows(table: Table) -> Iterable[tuple[int, Member, str, str]]:
    """Number of the line, file, label and split of each line of a table.

    Raises:
        DataError: when it has no such columns, or a line lacks one.
    """
    lines = lines_of(table)
    columns = columns_of(table, lines[0][1] if lines else [])
    if not columns:  # no heading: the first line is an image already
        columns = dict(zip(COLUMNS, range(len(lines[0][1]))))
    else:
        lines = lines[1:]
    if not lines:
        raise DataError(f"table {table.where} has no line with a file: add some")
    for number, row in lines:
        cells = {name: row[column].strip() if column < len(row) else "" for name, column in columns.items()}
        if not cells["file"] or not cells["label"]:
            raise DataError(f"table {table.where}, line {number} has no {'label' if cells['file'] else 'file'}: add it")
        split = split_of(cells["split"]) if "split" in cells else split_of(table.stem) or ALL
        if split is None:
            raise DataError(
                f"table {table.where}, line {number}: split {cells['split']!r} is not train, val or test: correct it"
            )
        yield number, table.member(cells["file"]), normal(cells["label"]), split


def columns_of(table: Table, heading: list[str]) -> dict[str, int]:
    """Which column is what by its heading; nothing where the first line names an image.

    Raises:
        DataError: where the first line is neither.
    """
    names = [name.strip().lower() for name in heading]
    columns = {
        kind: next(number for number, name in enumerate(names) if name in known)
        for kind, known in COLUMNS.items()
        if set(names) & known
    }
    if {"file", "label"} <= columns.keys():
        return columns
    if len(heading) in (2, 3) and table.member(heading[0].strip()).stamp:
        return {}
    raise DataError(
        f"table {table.where}: its first line must name the columns, such as file,label or file,label,split, not "
        f"{','.join(heading)!r}"
    )
