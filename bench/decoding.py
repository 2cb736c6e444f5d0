"""How fast photos are decoded and augmented, by one core, and whether a training step waits for them.

    python -m bench.decoding [--folder FOLDER]

Photos of 500 x 375 pixels, about ImageNet's, and of 12 megapixels are drawn; FOLDER is an image folder of one's own.
Each way to decode is timed in one thread: whole, at a fraction of the size where that suffices (Pillow's draft mode,
JPEG's own scaling), as a random resized crop, and with each augmentation; a reduced square is compared with the one
from the whole photo. Then one worker process decodes for steps that only sleep, as a GPU's would, at shares of the rate
of decoding: what is waited for images must be next to nothing below that rate, and the excess above it.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.record import RESULTS, write_results
from bench.tables import markdown
from fastres import data
from fastres.data import Augment, Batches, pixels
from fastres.data.budget import Budget
from fastres.data.files import FileSplit
from fastres.data.views import Views

SIZES = {"500 x 375": (500, 375), "4032 x 3024": (4032, 3024)}
VIEWS = {
    "central square": None,
    "random resized crop": Augment(0, crop_scale=0.08),
    "with jitter": Augment(0, crop_scale=0.08, color_jitter=0.4),
    "with RandAugment": Augment(0, crop_scale=0.08, auto_augment="rand"),
    "with TrivialAugment": Augment(0, crop_scale=0.08, auto_augment="trivial"),
    "with random erasing": Augment(0, crop_scale=0.08, random_erasing=1.0),
}
SHARES = (0.25, 0.5, 0.8, 2.0)  # of the rate of decoding, at which the steps take images
SEEN = 224


def photo(width: int, height: int, seed: int) -> bytes:
    """A JPEG of quality 90 with large areas, edges and fine grain."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (height // 50 + 2, width // 50 + 2, 3), dtype=np.uint8)
    scene = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    for _ in range(20):
        top, left = int(generator.integers(0, height)), int(generator.integers(0, width))
        scene[top : top + height // 8, left : left + width // 8] = generator.integers(0, 256, 3)
    scene += generator.integers(-10, 11, (height, width, 1), dtype=np.int16)
    file = io.BytesIO()
    Image.fromarray(scene.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def draw_folder(root: Path, size: tuple[int, int], count: int) -> None:
    """A folder of two classes with ``count`` photos for training and two for validation."""
    for split, number in (("train", count), ("val", 2)):
        for n in range(number):
            place = root / split / ("one", "other")[n % 2]
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{n}.jpg").write_bytes(photo(*size, seed=n + (split == "val") * count))


def rate(work: Callable[[int], Any], count: int, seconds: float) -> float:
    """Calls a second, of ``work`` on 0 to ``count - 1`` again and again, after a first one."""
    work(0)
    done, start = 0, time.perf_counter()
    while done < count or time.perf_counter() - start < seconds:
        work(done % count)
        done += 1
    return done / (time.perf_counter() - start)


def whole(split: FileSplit, number: int) -> np.ndarray:
    """The central square, from the photo decoded at its full size."""
    return pixels.cropped(pixels.upright_rgb(split.open(number)), split.side)


def decoding(split: FileSplit, seconds: float) -> tuple[dict[str, float], dict[str, float]]:
    """Images a second, and how far a reduced square is from the one from the whole photo."""
    count = min(len(split), 32)
    rates = {"central square, decoded whole": rate(lambda n: whole(split, n), count, seconds)}
    for name, augment in VIEWS.items():
        views = None if augment is None else Views(split, augment, (0, 0, 0), 0)
        rates[name] = rate(split.square if views is None else partial(views, epoch=0), count, seconds)
    differences = [np.abs(whole(split, n).astype(int) - split.square(n)) for n in range(count)]
    apart = {"mean": float(np.mean(differences)), "99.9%": float(np.quantile(differences, 0.999))}
    return rates, apart


def waiting(split: FileSplit, share: float, decoded: float, batch: int, steps: int) -> float:
    """Share of the time that steps wait which take images at ``share`` of the rate ``decoded``."""
    split = split.subset(torch.arange(batch * steps) % len(split))
    batches = Batches(split, batch, (0,) * 3, (1,) * 3, Augment(0, crop_scale=0.08), workers=1)
    each, start, first = batch / (share * decoded), 0.0, 0.0
    for step, _ in enumerate(batches.epoch(0)):
        if step == 0:  # nothing can be ready for the first one
            start, first = time.perf_counter(), batches.waited
        time.sleep(each)
    elapsed = time.perf_counter() - start
    waited = batches.waited - first
    batches.close()
    return waited / elapsed


def load(folder: Path) -> FileSplit:
    """The training photos of a folder, in their files."""
    nothing = Budget(0, "of the benchmark")
    split = data.load(folder, image_size=SEEN, say=lambda line: None, cache=False, budget=nothing).train
    assert isinstance(split, FileSplit)
    return split


def main(argv: list[str] | None = None) -> None:
    """Measure, print tables and write the results."""
    parser = argparse.ArgumentParser(prog="python -m bench.decoding", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--folder", type=Path, help="image folder to decode, beside the drawn photos")
    parser.add_argument("--count", type=int, default=32, help="drawn photos of each size [32]")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each measurement [2]")
    parser.add_argument("--batch", type=int, default=32, help="images a step [32]")
    parser.add_argument("--steps", type=int, default=24, help="steps that may wait [24]")
    parser.add_argument("--out", type=Path, default=RESULTS / "decoding-cpu.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    waits: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch) / str(number) for number, name in enumerate(SIZES)}
        for name, folder in folders.items():
            draw_folder(folder, SIZES[name], args.count)
        if args.folder is not None:
            folders[args.folder.name] = args.folder
        for name, folder in folders.items():
            split = load(folder)
            rates, apart = decoding(split, args.seconds)
            rows.append({"photos": name, "images_per_second": rates, "reduced_differs_by": apart})
            decoded = rates["random resized crop"]
            if name == "500 x 375":
                for share in SHARES:
                    waited = waiting(split, share, decoded, args.batch, args.steps)
                    waits.append({"share_of_decoding_rate": share, "waited_share": waited})
    kinds = list(rows[0]["images_per_second"])
    heads = ["images/s of one core", *(row["photos"] for row in rows)]
    table = [[kind, *(f"{row['images_per_second'][kind]:.0f}" for row in rows)] for kind in kinds]
    print(markdown(heads, table))
    print(markdown(["steps take images at", "time spent waiting"],
                   [[f"{w['share_of_decoding_rate']:g} of the rate of decoding", f"{w['waited_share']:.1%}"]
                    for w in waits]))  # fmt: skip
    write_results(args.out, {"decoding": rows, "waiting": waits, "side": SEEN, "batch": args.batch})


if __name__ == "__main__":
    main()
