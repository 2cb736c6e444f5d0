"""A tiny learnable dataset and quick options for tests of the training loop."""

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastres.data import Dataset, Split
from fastres.train import TrainConfig, Trainer
from fastres.train.run_folder import RunFolder

CLASSES = ("bright top", "bright bottom", "bright left")


def tiny_split(count: int, seed: int, size: int = 12) -> Split:
    """Noise images of three classes; the half that is brighter tells the class."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, len(CLASSES), count)
    images = random.integers(0, 120, (count, 3, size, size))
    half = size // 2
    images[labels == 0, :, :half] += 100
    images[labels == 1, :, half:] += 100
    images[labels == 2, :, :, :half] += 100
    return Split(
        torch.from_numpy(images.astype(np.uint8)).contiguous(memory_format=torch.channels_last),
        torch.from_numpy(labels),
    )


def tiny_dataset() -> Dataset:
    """96 training and 40 test images of 12x12 pixels."""
    return Dataset(
        train=tiny_split(96, 0),
        test=tiny_split(40, 1),
        classes=CLASSES,
        label="tiny",
        mean=(110.0, 110.0, 110.0),
        std=(60.0, 60.0, 60.0),
    )


def tiny_config(**changes) -> TrainConfig:
    """Two epochs of six steps of eager ResNet-20 in fp32 on the CPU."""
    quick = dict(
        model="resnet20", batch_size=16, lr=0.05, crop_pad=1, device="cpu", precision="fp32", flip="none",
        backend="eager",
    )  # fmt: skip
    length = {} if "steps" in changes else {"epochs": 2}
    return TrainConfig().replace(**{**quick, **length, **changes})


def tiny_trainer(folder, **changes) -> Trainer:
    """A trainer of `tiny_config` in ``folder``, silent."""
    return Trainer(tiny_config(**changes), tiny_dataset(), RunFolder(folder, resume=True), say=lambda line: None)


def same_weights(a: dict, b: dict) -> bool:
    """Whether two state_dicts are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


WAITS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "is_nonzero"}


class NoWait(TorchDispatchMode):
    """Counts operations whose result goes to the host."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += [func.overloadpacket.__name__] if func.overloadpacket.__name__ in WAITS else []
        return func(*args, **(kwargs or {}))
