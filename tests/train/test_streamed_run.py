"""A run whose images are over their memory budget: killed and resumed, it ends with the bits of one in memory."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import support_process
from PIL import Image
from support_train import same_weights

from fastres import data
from fastres.data import budget
from fastres.data.files import FileSplit
from fastres.train import TrainConfig, Trainer
from fastres.train.checkpoint import load_checkpoint
from fastres.train.run_folder import RunFolder

MIB = 1 / 1024  # of a GiB
CONFIG = TrainConfig().replace(
    model="resnet8", epochs=2, batch_size=8, lr=0.05, crop_pad=2, flip="random", cutout=4, device="cpu",
    precision="fp32", backend="eager", save_steps=1, memory_budget=0.2 * MIB, workers=2,
)  # fmt: skip


def draw_photos(folder: Path) -> None:
    """Photos of two classes, bright left or right: 40 of 64 pixels are 480 KiB, decoded."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 6)):
        for name, bright in (("left", slice(0, 40)), ("right", slice(40, None))):
            place = folder / split / name
            place.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 90, (64, 80, 3), dtype=np.uint8)
                pixels[:, bright] += 120
                Image.fromarray(pixels).save(place / f"{number}.jpg")


def trainer(folder: Path, photos: Path, config: TrainConfig) -> Trainer:
    dataset = data.load(photos, budget=budget.memory_budget(config.memory_budget), cache=False, say=lambda line: None)
    return Trainer(config, dataset, RunFolder(folder, resume=True), say=lambda line: None)


def train(folder: Path, photos: Path) -> None:
    support_process.begin()
    trainer(folder, photos, CONFIG).fit()


def test_a_streamed_run_is_killed_and_resumed_bit_for_bit(tmp_path):
    photos = tmp_path / "photos"
    draw_photos(photos)
    whole = trainer(tmp_path / "whole", photos, CONFIG.replace(memory_budget=None))
    assert not isinstance(whole.dataset.train, FileSplit)
    whole.fit()

    process = multiprocessing.get_context("forkserver").Process(target=train, args=(tmp_path / "run", photos))
    process.start()
    last, until = tmp_path / "run" / "last.pt", time.monotonic() + support_process.LIMIT
    while not (last.exists() and load_checkpoint(last)["step"] >= 3) and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    step = load_checkpoint(last)["step"]
    assert process.exitcode == -signal.SIGKILL and 3 <= step < 10 and step != 5

    resumed = trainer(tmp_path / "run", photos, CONFIG)
    assert isinstance(resumed.dataset.train, FileSplit)
    resumed.resume()
    assert resumed.step == step
    history = resumed.fit()
    assert same_weights(resumed.model.state_dict(), whole.model.state_dict())
    timed = {"seconds", "train_seconds", "waited_seconds", "images_per_second", "peak_memory_mib"}
    for row, expected in zip(history, whole.history, strict=True):
        assert {name for name in row if row[name] != expected[name]} <= timed | {
            "train_seconds_per_batch", "val_seconds_per_batch",
        }  # fmt: skip
        assert row["waited_seconds"] >= 0 and expected["waited_seconds"] == 0
