"""``fastres predict``: the most probable classes of image files, folders and whatever names them."""

from __future__ import annotations

import argparse
import csv
import glob
import json
import os
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import torch

from fastres import data
from fastres.data.decode import Fault, decode, unreadable
from fastres.data.layout import is_image
from fastres.data.tree import Member, named, plain, read_file, walk
from fastres.errors import FastresError
from fastres.train import TrainConfig, machine
from fastres.train.evaluate import predict_logits
from fastres.train.trained import Trained, find_checkpoint, load_trained
from fastres.train.useless import check_given
from fastres.train.views import Views

CHUNK = 64  # images at a time


def image_files(names: Iterable[str]) -> list[str]:
    """The files that the arguments name, in their order; those of a folder are all images in it, sorted.

    Raises:
        FastresError: for a folder or a pattern without an image.
    """
    files: list[str] = []
    for name in names:
        if name == "-":
            files += [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
            continue
        if os.path.isdir(name):
            found = [member.where for member in walk(Path(name)).members if is_image(member)]
        elif not os.path.lexists(name) and glob.has_magic(name):
            found = sorted(path for path in glob.glob(name, recursive=True) if os.path.isfile(path))
        else:
            found = [name]
        if not found:
            raise FastresError(f"{plain(name)} holds no image: name files, folders or a pattern that fits some")
        files += found
    if not files:
        raise FastresError("no name came from standard input: give one a line")
    return files


@torch.inference_mode()
def guesses(
    trained: Trained, files: list[str], device: torch.device, views: Views | None, top: int, faults: list[Fault]
) -> Iterator[tuple[str, list[tuple[str, float]]]]:
    """Each file with its ``top`` classes and their probabilities; files that cannot be read go to ``faults``."""
    for start in range(0, len(files), CHUNK):
        members = [Member((), path, "", partial(read_file, path)) for path in files[start : start + CHUNK]]
        pixels, bad = decode(members, None, trained.stored_size, share=trained.center_share)
        faults += bad.values()
        good = [number for number in range(len(members)) if number not in bad]
        if not good:
            continue
        images = torch.from_numpy(pixels[good]).permute(0, 3, 1, 2).to(device)
        inputs = data.normalise(data.resize(images, trained.image_size), trained.mean, trained.std)
        best = predict_logits(trained.model, inputs, views).softmax(1).topk(min(top, len(trained.classes)))
        for number, shares, classes in zip(good, best.values.tolist(), best.indices.tolist()):
            yield members[number].where, [(trained.classes[i], share) for i, share in zip(classes, shares)]


def predict(args: argparse.Namespace) -> int:
    """Print the most probable classes of image files.

    Raises:
        FastresError: after all others, for the files that cannot be read, unless they are to be skipped.
    """
    device = machine.pick_device(getattr(args, "device", "auto"))
    machine.use_device(device)
    trained = load_trained(find_checkpoint(args.checkpoint), device)
    faults: list[Fault] = []
    given = {name: getattr(args, name) for name in ("tta", "tta_shift") if hasattr(args, name)}
    config = TrainConfig().replace(**given)
    check_given([config], given)
    views = config.views
    if views is not None:
        views.check(trained.image_size)
    found = guesses(trained, image_files(args.images), device, views, args.top, faults)
    table = csv.writer(sys.stdout, lineterminator="\n")
    for number, (path, row) in enumerate(found):
        if number == 0:
            print(f"{trained.path}, epoch {trained.epoch}, trained on {trained.data}", file=sys.stderr, flush=True)
            if args.csv:
                heads = [(f"class {rank}", f"probability {rank}") for rank in range(1, len(row) + 1)]
                table.writerow(["file", *(head for pair in heads for head in pair)])
        if args.json:
            classes = [{"class": name, "probability": share} for name, share in row]
            print(json.dumps({"file": plain(path), "classes": classes}))
        elif args.csv:
            table.writerow([plain(path), *(cell for name, share in row for cell in (name, f"{share:.6f}"))])
        else:
            print("  ".join([plain(path), *(f"{name} {share:.1%}" for name, share in row)]))
    if faults and not getattr(args, "skip_bad", False):
        raise unreadable(faults)
    if faults:
        print(f"left out: {len(faults)} unreadable images ({named(fault.where for fault in faults)})", file=sys.stderr)
    return 0
