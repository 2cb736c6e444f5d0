"""Damaged files of every kind that fastres reads, and what comes of reading them.

A reader must refuse a damaged file in one line that names it, or yield the very same data; anything else is wrong.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import pickle
import random
import warnings
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

from fastres import data
from fastres.data.cache import Cache
from fastres.data.cifar import CIFAR10 as KIND
from fastres.data.dataset import Dataset, make_dataset, make_parts
from fastres.data.decode import read_image
from fastres.data.synthetic import CLASSES, synthetic_split
from fastres.errors import FastresError
from fastres.export import write_safetensors
from fastres.ops.cpu import build
from fastres.ops.timing import TimedChoices
from fastres.train import TrainConfig, Trainer, pretrained
from fastres.train.best import held_epoch
from fastres.train.checkpoint import load_checkpoint, save_checkpoint
from fastres.train.identity import checksum
from fastres.train.run_folder import RunFolder, saved_config
from fastres.train.sweep import read_result


def damaged(raw: bytes, draw: random.Random) -> bytes:
    """A copy with flipped bits, cut short, or with a part zeroed, dropped, repeated or exchanged for noise."""
    place = draw.randrange(len(raw))
    length = min(draw.choice([1, 4, 64, 512]), len(raw) - place)
    kind = draw.choice(["flip", "flip", "flip", "cut", "zero", "drop", "repeat", "noise", "append"])
    before, part, after = raw[:place], raw[place : place + length], raw[place + length :]
    if kind == "flip":
        return before + bytes([raw[place] ^ 1 << draw.randrange(8)]) + raw[place + 1 :]
    if kind == "append":
        return raw + draw.randbytes(length)
    return {
        "cut": before,
        "zero": before + bytes(length) + after,
        "drop": before + after,
        "repeat": before + part + part + after,
        "noise": before + draw.randbytes(length) + after,
    }[kind]


def same(one: Any, other: Any) -> bool:
    """Whether two nests of dictionaries, sequences, tensors and arrays are equal, types too."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Dataset):
        return same(facts(one), facts(other))
    return bool(one == other)


def facts(dataset: Dataset) -> list[Any]:
    """All that a dataset holds, as a nest."""
    splits = [[split.sample(torch.arange(len(split))), split.labels] for split in (dataset.train, dataset.test)]
    return [*splits, dataset.classes, dataset.label, dataset.mean, dataset.std]


def outcomes(file: Path, read: Callable[[], Any], times: int, draw: random.Random, *words: str) -> list[str]:
    """Damage a file again and again, and read it each time; ``words`` besides its name must be in a refusal."""
    raw, whole, found = file.read_bytes(), read(), []
    for _ in range(times):
        file.write_bytes(damaged(raw, draw))
        found.append(outcome(read, whole, (file.name, *words)))
    file.write_bytes(raw)
    return found


def outcomes_with_warnings(
    file: Path, read: Callable[[], Any], said: list[str], times: int, draw: random.Random
) -> list[str]:
    """`outcomes` of a file that is made anew where it is damaged: the same data with a warning in ``said`` is a
    refusal.
    """
    raw, whole, found = file.read_bytes(), read(), []
    for _ in range(times):
        file.write_bytes(damaged(raw, draw))
        said.clear()
        result = outcome(read, whole, ())
        warned = said and all("\n" not in line and str(file) in line for line in said)
        found.append("refused" if result == "harmless" and warned else result)
    return found


def outcome(read: Callable[[], Any], whole: Any, words: tuple[str, ...]) -> str:
    """``refused`` for a message of one line with the words, ``harmless`` for the same data as before."""
    try:
        got = read()
    except FastresError as error:
        text = str(error)
        return "refused" if "\n" not in text and all(w in text for w in words) else f"wrong: message {text!r}"
    except Exception as error:
        return f"wrong: {type(error).__name__}: {error}"
    return "harmless" if same(got, whole) else "wrong: other data, without a word"


def checkpoint(folder: Path, times: int, seed: int) -> list[str]:
    """A checkpoint with weights, momenta and a history."""
    folder.mkdir()
    file = folder / "last.pt"
    weights = {f"layer{i}.weight": torch.randn(16, 8, 3, 3) for i in range(4)}
    state = {i: {"momentum_buffer": torch.randn(8)} for i in range(4)}
    save_checkpoint(file, {"weights": weights, "optimizer": {"state": state}, "history": [{"epoch": 1, "loss": 0.5}]})
    return outcomes(file, lambda: load_checkpoint(file), times, random.Random(seed), str(folder))


def image_cache(folder: Path, times: int, seed: int) -> list[str]:
    """A file of decoded images, which is built anew with a warning where it is damaged."""
    split = synthetic_split(16)
    parts = make_parts({"train": split, "test": split}, CLASSES)
    said: list[str] = []

    def read() -> Dataset:
        kept = Cache(folder, said.append).parts("0" * 64, "32", lambda: parts)
        return Dataset(kept.splits["train"], kept.splits["test"], kept.classes, "drawn", kept.mean, kept.std)

    read()
    (file,) = folder.iterdir()
    return outcomes_with_warnings(file, read, said, times, random.Random(seed))


def timed_choices(folder: Path, times: int, seed: int) -> list[str]:
    """Which kernel is the fastest at each shape, which is timed anew with a warning where it is damaged."""
    costs = {f"conv({size}x{size}x64, bfloat16)": {"triton": 1.5, "library": size / 16} for size in (8, 16, 32, 64)}
    file = folder / "choices.json"
    said: list[str] = []

    def read() -> dict[str, str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            choices = TimedChoices(file, "GPU", lambda call: call())
            found = {
                key: choices.choose(key, {name: partial(float, cost) for name, cost in costs[key].items()})
                for key in costs
            }
        said.extend(str(warning.message) for warning in caught)
        return found

    read()
    return outcomes_with_warnings(file, read, said, times, random.Random(seed))


def config(folder: Path, times: int, seed: int) -> list[str]:
    """The options of a run, which is resumed with them."""
    run = RunFolder(folder)
    run.write_config(TrainConfig().replace(model="resnet20", epochs=3, lr=0.05), {"data": "drawn"})
    run.close()
    file = folder / "config.json"
    return outcomes(file, lambda: saved_config(folder).to_dict(), times, random.Random(seed), str(folder))


def result(folder: Path, times: int, seed: int) -> list[str]:
    """A sweep's ``result.json``: damaged, it is no result, and the run's checkpoint is read in its place."""
    folder.mkdir()
    split = synthetic_split(16)
    dataset = make_dataset(split, split, CLASSES, "drawn")
    content = {"row": {"epoch": 3, "val_accuracy": 0.5, "val_loss": 1.5}, "digest": dataset.digest}
    file = folder / "result.json"
    file.write_text(json.dumps({**content, "checksum": checksum(list(content.values()))}))

    def read() -> Any:
        row = read_result(folder, dataset)
        if row is None:
            raise FastresError(f"{file} is no result")
        return row

    return outcomes(file, read, times, random.Random(seed), str(folder))


def library(folder: Path, times: int, seed: int) -> list[str]:
    """The compiled passes, which are compiled anew where they are damaged; no damaged file may be loaded."""
    folder.mkdir(mode=0o700)
    file = folder / "passes-0.so"
    code = random.Random(seed).randbytes(2**18)  # never run: what is tried is whether it would be loaded
    file.write_bytes(code + build._seal(code))
    file.chmod(0o600)

    def read() -> bytes:
        if not build._is_whole(file):
            raise FastresError(f"{file} is not whole")
        return file.read_bytes()[: len(code)]

    return outcomes(file, read, times, random.Random(seed), str(folder))


def image(folder: Path, times: int, seed: int) -> list[str]:
    """A PNG of an image folder."""
    folder.mkdir()
    file = folder / "0001.png"
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return outcomes(file, lambda: read_image(file, 16), times, random.Random(seed), str(folder))


def batches(folder: Path, times: int, seed: int) -> list[str]:
    """CIFAR-10's batches: damage that leaves them readable must cost them their name."""
    folder = folder / KIND.folder
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for name in (*KIND.train, KIND.test):
        content = {b"data": generator.integers(0, 256, (4, 3072), dtype=np.uint8), b"labels": [0, 1, 2, 3]}
        (folder / name).write_bytes(pickle.dumps(content, 2))
    (folder / KIND.meta).write_bytes(pickle.dumps({b"label_names": [b"class %d" % i for i in range(10)]}, 2))
    draw, found = random.Random(seed), []
    with genuine(folder):

        def read() -> Dataset | str:
            dataset = data.load(folder, cache=False)
            return dataset if dataset.label == KIND.name else "named otherwise"

        for number in range(times):
            file = folder / KIND.files[number % len(KIND.files)]
            raw, whole = file.read_bytes(), read()
            file.write_bytes(damaged(raw, draw))
            result = outcome(read, whole, (file.name, "again"))
            with contextlib.suppress(FastresError):
                result = "refused" if read() == "named otherwise" else result
            found.append(result)
            file.write_bytes(raw)
    return found


@contextlib.contextmanager
def genuine(folder: Path) -> Iterator[None]:
    """Let torchvision take the files of a folder for the published ones."""
    from torchvision.datasets import CIFAR10

    def entry(name: str) -> list[str]:
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    meta = dict(zip(("filename", "md5"), entry(KIND.meta)), key="label_names")
    train = [entry(name) for name in KIND.train]
    lists: dict[str, Any] = {"train_list": train, "test_list": [entry(KIND.test)], "meta": meta}
    with mock.patch.multiple(CIFAR10, **lists):
        yield


def read_again(file: Path) -> dict[str, torch.Tensor]:
    """Weights to start from, whatever was read a moment ago."""
    pretrained._read.cache_clear()
    return dict(pretrained.read_weights(str(file), "resnet18").tensors)


def weights_file(folder: Path, times: int, seed: int) -> list[str]:
    """A state_dict that a run is to start from."""
    folder.mkdir()
    file = folder / "weights.pth"
    torch.save({f"layer{i}.weight": torch.randn(16, 8, 3, 3) for i in range(4)}, file)
    return outcomes(file, partial(read_again, file), times, random.Random(seed), str(folder))


def safetensors_file(folder: Path, times: int, seed: int) -> list[str]:
    """What `fastres export` writes: the format has no checksum of its own."""
    folder.mkdir()
    file = folder / "weights.safetensors"
    weights = {f"layer{i}.weight": torch.randn(16, 8, 3, 3) for i in range(4)}
    write_safetensors(file, weights, {"architecture": "resnet18", "label_names": ["a", "b"], "pretrained_cfg": {}})
    return outcomes(file, partial(read_again, file), times, random.Random(seed), str(folder))


def best_checkpoint(folder: Path, times: int, seed: int) -> list[str]:
    """``best.pt`` of a run that goes on: it is made again of the last checkpoint, with a warning."""
    run = RunFolder(folder / "run")
    try:
        split, said = synthetic_split(32), []
        config = TrainConfig().replace(
            model="resnet8", steps=1, image_size=8, batch_size=32, device="cpu", precision="fp32", backend="eager"
        )
        trainer = Trainer(config, make_dataset(split, split, CLASSES, "drawn shapes"), run, say=said.append)
        trainer.fit()

        def read() -> Any:
            held_epoch(trainer)
            return dict(load_checkpoint(run.best)["weights"])

        return outcomes_with_warnings(run.best, read, said, times, random.Random(seed))
    finally:
        run.close()


def archive(folder: Path, times: int, seed: int) -> list[str]:
    """A zip file with an image folder in it."""
    folder.mkdir()
    file, random_pixels = folder / "photos.zip", np.random.default_rng(0)
    with zipfile.ZipFile(file, "w") as into:
        for name in ("train/ant/1", "train/bee/2", "test/ant/3", "test/bee/4"):
            image, content = Image.fromarray(random_pixels.integers(0, 256, (9, 9, 3), dtype=np.uint8)), io.BytesIO()
            image.save(content, "png")
            into.writestr(f"{name}.png", content.getvalue())

    def read() -> Any:
        return facts(data.load(file, cache=False, say=lambda line: None))

    return outcomes(file, read, times, random.Random(seed))


KINDS: dict[str, Callable[[Path, int, int], list[str]]] = {
    "checkpoint": checkpoint,
    "best.pt of a run that goes on": best_checkpoint,
    "weights to start from": weights_file,
    "image cache": image_cache,
    "choices.json": timed_choices,
    "config.json": config,
    "result.json": result,
    "compiled library": library,
    "PNG": image,
    "CIFAR-10 batch": batches,
    "zip archive of images": archive,
}
if find_spec("safetensors") is not None:
    KINDS["exported safetensors"] = safetensors_file
