"""Labelled images: sources, augmentation on the device, and batches."""

from fastres.data.augment import Augment, crop_and_flip, cutout, normalise, resize
from fastres.data.batches import Batches
from fastres.data.dataset import DataError, Dataset, Split, limit, limit_split
from fastres.data.decode import read_images
from fastres.data.sources import load, load_test

__all__ = [
    "Augment",
    "Batches",
    "DataError",
    "Dataset",
    "Split",
    "crop_and_flip",
    "cutout",
    "limit",
    "limit_split",
    "load",
    "load_test",
    "normalise",
    "read_images",
    "resize",
]
