"""The data of all examples: drawn shapes in ten classes, 32x32 pixels, as a PyTorch dataset."""

from torch.utils.data import TensorDataset

from fastres.data import normalise
from fastres.data.synthetic import synthetic_split


def shapes(images: int) -> TensorDataset:
    """Normalised images [images, 3, 32, 32] in channels-last, and their classes."""
    split = synthetic_split(images)
    return TensorDataset(normalise(split.images, mean=(128,) * 3, std=(64,) * 3), split.labels)
