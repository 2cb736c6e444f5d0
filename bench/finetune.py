"""Fine-tuning on few photos: a ResNet-18 that has seen other shapes, beside one that begins anew.

    python -m bench.finetune

Two image folders are drawn, JPEG photos of shapes on textured grounds, some stored on their side as phones do: one of
six shapes to learn from, one of four others with few photos. ``fastres train`` learns the first at 224 pixels; the
second is learnt with ``--weights`` of that run, and from new weights, with the same options. Photos are streamed from
their files with random resized crops.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from bench.record import RESULTS, write_results
from bench.tables import markdown
from fastres.cli import main as fastres

SIDEWAYS = 6  # an EXIF orientation
ANGLES = {"triangle": 3, "square": 4, "pentagon": 5}
SOURCE = ("triangle", "square", "disc", "ring", "cross", "bars")
TARGET = ("pentagon", "star", "half", "frame")
OPTIONS = "--model resnet18 --image-size 224 --crop-scale 0.5 --flip random --batch-size 20 --lr 0.02 --warmup 0.2"


def outline(kind: str, turn: float, corners: int) -> list[tuple[float, float]]:
    """Corners of a regular polygon, or of a star, on the unit circle."""
    count = 10 if kind == "star" else corners
    radii = [1.0 if kind != "star" or n % 2 == 0 else 0.45 for n in range(count)]
    angles = [turn + 2 * np.pi * n / count for n in range(count)]
    return [(r * np.cos(a), r * np.sin(a)) for r, a in zip(radii, angles)]


def draw_photo(kind: str, generator: np.random.Generator) -> Image.Image:
    """A photo of one shape: any place, size, angle and colours, on a ground with texture."""
    width, height = (int(side) for side in generator.integers(280, 420, 2))
    coarse = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    ground = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16) // 2
    image = Image.fromarray((ground + generator.integers(0, 60, (height, width, 1))).clip(0, 255).astype(np.uint8))
    radius = min(width, height) * generator.uniform(0.25, 0.4)
    x, y = (generator.uniform(0.9 * radius, side - 0.9 * radius) for side in (width, height))
    ink = tuple(int(value) for value in generator.integers(150, 256, 3))
    draw, turn = ImageDraw.Draw(image), generator.uniform(0, 2 * np.pi)
    box = x - radius, y - radius, x + radius, y + radius

    def polygon(points: list[tuple[float, float]]) -> None:
        cos, sin = np.cos(turn), np.sin(turn)
        draw.polygon(
            [(x + radius * (u * cos - v * sin), y + radius * (u * sin + v * cos)) for u, v in points], fill=ink
        )

    if kind == "disc":
        draw.ellipse(box, fill=ink)
    elif kind == "half":
        draw.pieslice(box, np.degrees(turn), np.degrees(turn) + 180, fill=ink)
    elif kind == "ring":
        draw.ellipse(box, outline=ink, width=round(radius / 4))
    elif kind == "cross":
        polygon([(-1, -0.2), (1, -0.2), (1, 0.2), (-1, 0.2)])
        polygon([(-0.2, -1), (0.2, -1), (0.2, 1), (-0.2, 1)])
    elif kind == "bars":
        for low in (-0.8, -0.2, 0.4):
            polygon([(-1, low), (1, low), (1, low + 0.3), (-1, low + 0.3)])
    elif kind == "frame":
        for u, v in ((-0.8, 0), (0.8, 0), (0, -0.8), (0, 0.8)):
            across, down = (0.15, 0.95) if u else (0.95, 0.15)
            polygon([(u - across, v - down), (u + across, v - down), (u + across, v + down), (u - across, v + down)])
    else:
        polygon(outline(kind, 0.0, ANGLES.get(kind, 0)))
    return image


def draw_folder(root: Path, classes: tuple[str, ...], train: int, val: int, seed: int) -> Path:
    """An image folder with so many photos a class; every fourth one is stored on its side."""
    generator = np.random.default_rng(seed)
    for split, count in (("train", train), ("val", val)):
        for name in classes:
            place = root / split / name
            place.mkdir(parents=True)
            for number in range(count):
                image, tag = draw_photo(name, generator), Image.Exif()
                if number % 4 == 0:
                    tag[0x0112] = SIDEWAYS
                    image = image.transpose(Image.Transpose.ROTATE_90)
                image.save(place / f"{number:04}.jpg", quality=90, exif=tag)
    return root


def train(out: Path, photos: Path, epochs: int, *more: str) -> dict[str, Any]:
    """Train with ``fastres train``; its best accuracy, seconds, and images a second of the last epoch."""
    start = time.perf_counter()
    argv = ["train", *OPTIONS.split(), "--data", str(photos), "--out", str(out), "--epochs", str(epochs), *more]
    if fastres(argv) != 0:
        raise SystemExit(f"fastres {' '.join(argv)} failed")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "epochs": epochs,
        "accuracy": max(row["val_accuracy"] for row in rows),
        "last_accuracy": rows[-1]["val_accuracy"],
        "images_per_second": rows[-1]["images_per_second"],
        "waited_share": sum(row["waited_seconds"] for row in rows) / rows[-1]["train_seconds"],
        "seconds": time.perf_counter() - start,
    }


def main(argv: list[str] | None = None) -> None:
    """Draw, train three times, print a table and write the results."""
    parser = argparse.ArgumentParser(prog="python -m bench.finetune", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--photos", type=int, default=100, help="photos a class to learn from at first [100]")
    parser.add_argument("--few", type=int, default=20, help="photos a class to fine-tune on [20]")
    parser.add_argument("--epochs", type=int, default=8, help="of the first run [8]")
    parser.add_argument("--few-epochs", type=int, default=6, help="of the others [6]")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "finetune-cpu.json")
    parser.add_argument("options", nargs="*", help="more options of fastres train, behind --")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        many = draw_folder(root / "many", SOURCE, args.photos, max(2, args.photos // 5), 0)
        few = draw_folder(root / "few", TARGET, args.few, max(2, args.few), 1)
        found = {
            "first": train(root / "first", many, args.epochs, *args.options),
            "fine-tuned": train(root / "tuned", few, args.few_epochs, "--weights", str(root / "first"), *args.options),
            "anew": train(root / "anew", few, args.few_epochs, *args.options),
        }
    what = {
        "first": f"6 shapes, {args.photos} photos each, new weights",
        "fine-tuned": f"4 other shapes, {args.few} photos each, `--weights` of that run",
        "anew": f"4 other shapes, {args.few} photos each, new weights",
    }
    rows = [
        [what[name], f"{run['epochs']}", f"{run['accuracy']:.1%}", f"{run['last_accuracy']:.1%}"]
        for name, run in found.items()
    ]
    print(markdown(["trained on", "epochs", "best accuracy", "of the last epoch"], rows))
    write_results(args.out, {"options": OPTIONS, "photos": args.photos, "few": args.few, "runs": found})


if __name__ == "__main__":
    main()
