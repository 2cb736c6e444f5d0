"""Labelled images: sources, augmentation on the device, and batches."""

from fastres.data.augment import Augment, crop_and_flip, cutout, normalise, resize
from fastres.data.batches import Batches
from fastres.data.dataset import DataError, Dataset, Split, limit
from fastres.data.folder import read_images
from fastres.data.sources import load

__all__ = [
    "Augment",
    "Batches",
    "DataError",
    "Dataset",
    "Split",
    "crop_and_flip",
    "cutout",
    "limit",
    "load",
    "normalise",
    "read_images",
    "resize",
]
