"""CSV files that name images and their classes: a line an image, with a column for the file and one for the label."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from fastres.data.dataset import DataError
from fastres.data.layout import ALL, SPLITS, Listing, split_of
from fastres.data.tree import Member, normal, read_file, stamp

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
REPEATED = "lines that repeat a file"


def read_tables(paths: Iterable[Path], where: Path) -> Listing:
    """The images of one table, or of several that are named after splits.

    A file is looked for beside its table, in the folder of the table's name, and in ``images``. Labels that are all
    whole numbers are sorted as numbers.

    Raises:
        DataError: for a table that is no table of files and labels; the message names the line.
    """
    labelled: dict[str, tuple[str, str]] = {}  # by file: label and split
    left_out: dict[str, list[str]] = {}
    for path in paths:
        for line, file, label, split in read_rows(path):
            if file in labelled and labelled[file] != (label, split):
                raise DataError(
                    f"{path}, line {line}: {file} is {label!r} in {split!r} here and {labelled[file][0]!r} in "
                    f"{labelled[file][1]!r} above: keep one of the lines"
                )
            if file in labelled:
                left_out.setdefault(REPEATED, []).append(f"{path}, line {line}")
            labelled[file] = label, split
    names = {label for label, _ in labelled.values()}
    numeric = all(name.isdecimal() for name in names)
    classes = tuple(sorted(names, key=lambda name: (int(name) if numeric else 0, name)))
    numbers = {name: number for number, name in enumerate(classes)}
    splits: dict[str, list[tuple[Member, int]]] = {}
    for split in (*SPLITS, ALL):
        if part := [(member(file), numbers[label]) for file, (label, kind) in labelled.items() if kind == split]:
            splits[split] = part
    if len(splits) > 1 and ALL in splits:
        raise DataError(f"{where} has a split for some files and none for others: give every line one")
    return Listing(str(where), classes, splits, left_out)


def tables_in(folder: Path) -> list[Path]:
    """The tables of a folder that are named after splits, else its only one, else none."""
    tables = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    named = [path for path in tables if split_of(path.stem)]
    return named or (tables if len(tables) == 1 else [])


def read_rows(path: Path) -> Iterable[tuple[int, str, str, str]]:
    """Number of the line, path of the file, label and split of each line of a table.

    Raises:
        DataError: when it has no such columns, or a line lacks one.
    """
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"table {path} cannot be read ({error}): save it as CSV in UTF-8") from error
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    try:
        lines = [
            (number, row)
            for number, row in enumerate(csv.reader(text.splitlines(), delimiter=delimiter), 1)
            if any(row)
        ]
    except csv.Error as error:
        raise DataError(f"table {path} cannot be read ({error}): save it as CSV in UTF-8") from error
    columns = columns_of(path, lines[0][1] if lines else [])
    if not columns:  # no heading: the first line is an image already
        columns = dict(zip(COLUMNS, range(len(lines[0][1]))))
    else:
        lines = lines[1:]
    if not lines:
        raise DataError(f"table {path} has no line with a file: add some")
    for number, row in lines:
        cells = {name: row[column].strip() if column < len(row) else "" for name, column in columns.items()}
        if not cells["file"] or not cells["label"]:
            raise DataError(f"table {path}, line {number} has no {'label' if cells['file'] else 'file'}: add it")
        split = split_of(cells["split"]) if "split" in cells else split_of(path.stem) or ALL
        if split is None:
            raise DataError(
                f"table {path}, line {number}: split {cells['split']!r} is not train, val or test: correct it"
            )
        yield number, found(path, cells["file"]), normal(cells["label"]), split


def columns_of(path: Path, heading: list[str]) -> dict[str, int]:
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
    if len(heading) in (2, 3) and os.path.isfile(found(path, heading[0].strip())):
        return {}
    raise DataError(
        f"table {path}: its first line must name the columns, such as file,label or file,label,split, not "
        f"{','.join(heading)!r}"
    )


def found(table: Path, name: str) -> str:
    """Where a file that a table names is: the first of the places that has it, else beside the table."""
    folders = (table.parent, table.parent / table.stem, table.parent / "images")
    places = [os.path.join(folder, name + ending) for ending in ENDINGS for folder in folders]
    return next((place for place in places if os.path.isfile(place)), places[0])


def member(path: str) -> Member:
    """A file that a table names; one that is not there fails when it is read."""
    try:
        mark = stamp(os.stat(path))
    except OSError:
        mark = ""
    return Member((path,), path, mark, partial(read_file, path))
