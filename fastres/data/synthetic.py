"""A built-in set of drawn images: ten shapes that neither colour, place, size nor direction tells apart.

Every image is a function of (seed, split, number) alone and is drawn with integer arithmetic only, so its
bytes are the same on every machine. A shape has a random place, size, direction and colour gradient, on a
gradient of another colour with small coloured specks; one square hides a part of it and every pixel has
noise. Since light on dark is as frequent as dark on light, the mean image of every class is the same and a
linear classifier stays near chance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from fastres.data.dataset import Parts, Split, make_parts

SIDE = 32
SIZES = 10_000, 2_000  # of training and test
LABEL = "synthetic shapes (not CIFAR-10)"
CHUNK = 250  # images drawn at once: their coordinates stay in the processor's cache

# cos and sin of the 64 directions and of the pentagram's five normals, and a triangle's, as integers
DIRECTIONS = np.rint(1024 * np.exp(2j * np.pi * np.arange(64) / 64))
PENTAGRAM = ((0, 256), (243, 79), (150, -207), (-150, -207), (-243, 79))
TRIANGLE = ((0, 256), (222, -128), (-222, -128))


def _within(u: np.ndarray, v: np.ndarray, low: int, high: int) -> np.ndarray:
    square = u * u + v * v
    return (square >= low * low) & (square < high * high)


def _box(u: np.ndarray, v: np.ndarray, half_width: int, half_height: int) -> np.ndarray:
    return (np.abs(u) < half_width) & (np.abs(v) < half_height)


def _sides(u: np.ndarray, v: np.ndarray, normals: Sequence[tuple[float, float]], distance: int) -> np.ndarray:
    """How many of the half planes hold a point."""
    return np.add.reduce([(a * u + b * v < 256 * distance).astype(np.int8) for a, b in normals], axis=0, dtype=np.int8)


# Each shape tells which points (u, v) are in it; most of it lies in a circle of radius 256.
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "disc": lambda u, v: _within(u, v, 0, 225),
    "ring": lambda u, v: _within(u, v, 130, 245),
    "square": lambda u, v: _box(u, v, 190, 190),
    "triangle": lambda u, v: _sides(u, v, TRIANGLE, 125) == 3,
    "cross": lambda u, v: _box(u, v, 75, 250) | _box(u, v, 250, 75),
    "star": lambda u, v: _sides(u, v, PENTAGRAM, 88) >= 4,
    "crescent": lambda u, v: _within(u, v, 0, 245) & ~_within(u - 120, v, 0, 200),
    "bars": lambda u, v: _box(u, v, 210, 210) & ((np.abs(u) < 52) | (np.abs(u) > 132)),
    "checker": lambda u, v: _box(u, v, 216, 216) & ((((u + 216) // 144 + (v + 216) // 144) & 1) == 0),
    "arrow": lambda u, v: _box(u, v + 10, 60, 240) | ((v > 0) & (v < 250) & (np.abs(u) < 250 - v)),
}
CLASSES = tuple(SHAPES)


def splitmix(x: np.ndarray) -> np.ndarray:
    """The output function of splitmix64 (Steele, Lea & Flood 2014) on uint64 counters."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Choices:
    """Random integers of some images; each call takes the next one of every image."""

    def __init__(self, keys: np.ndarray):
        self.keys, self.calls = keys, 0  # keys: uint64 [n], one hash an image

    def integers(self, low: int, stop: int) -> np.ndarray:
        """int32 [n, 1, 1], uniform in low..stop-1."""
        self.calls += 1
        bits = splitmix(self.keys + np.uint64(self.calls)) >> np.uint64(32)
        drawn = (bits * np.uint64(stop - low)) >> np.uint64(32)
        return (drawn.astype(np.int32) + np.int32(low))[:, None, None]

    def colour(self) -> np.ndarray:
        """int32 [n, 1, 1, 3], 0..255."""
        return np.stack([self.integers(0, 256) for _ in range(3)], axis=-1)

    def noise(self, reach: int) -> np.ndarray:
        """int16 [n, SIDE, SIDE, 3], triangular in -reach..reach; ``reach`` is a power of two, at most 128."""
        words = SIDE * SIDE * 3 // 4
        counters = np.arange(1, words + 1, dtype=np.uint64) << np.uint64(16)
        pieces = splitmix(self.keys[:, None] + counters).astype("<u8").view(np.uint8) & np.uint8(reach - 1)
        pieces = pieces.reshape(len(self.keys), SIDE, SIDE, 3, 2).astype(np.int16)
        return pieces[..., 0] - pieces[..., 1]


def _cover(shape: Callable, choices: Choices) -> np.ndarray:
    """How many of each pixel's 2 x 2 sample points lie in the shape: int32 [n, SIDE, SIDE], 0..4."""
    radius = choices.integers(40, 54)  # in quarters of a pixel, as are the places
    x, y = choices.integers(-12, 13), choices.integers(-12, 13)
    direction = DIRECTIONS[choices.integers(0, len(DIRECTIONS))]
    cos, sin = direction.real.astype(np.int32), direction.imag.astype(np.int32)
    sample = np.arange(1 - 2 * SIDE, 2 * SIDE, 2, dtype=np.int32)
    across, down = sample[None, None, :] - x, sample[None, :, None] - y
    reciprocal = 4096 // radius  # so that the radius becomes about 256, of 1024 * 4096 / 2**14
    u = ((cos * across + sin * down) * reciprocal) >> 14
    v = ((cos * down - sin * across) * reciprocal) >> 14
    inside = shape(u, v).reshape(len(radius), SIDE, 2, SIDE, 2)
    return inside.sum(axis=(2, 4), dtype=np.int32)


def _gradient(colour: np.ndarray, choices: Choices) -> np.ndarray:
    """A colour that changes linearly over the image: int32 [n, SIDE, SIDE, 3]."""
    ramp = np.arange(-SIDE // 2, SIDE // 2, dtype=np.int32)
    slope_x, slope_y = choices.integers(-2, 3), choices.integers(-2, 3)
    return colour + (slope_x * ramp[None, None, :] + slope_y * ramp[None, :, None])[..., None]


def _square(choices: Choices, low: int, stop: int) -> np.ndarray:
    """A square of random place and size: bool [n, SIDE, SIDE, 1]."""
    size, x, y = choices.integers(low, stop), choices.integers(0, SIDE), choices.integers(0, SIDE)
    pixel = np.arange(SIDE, dtype=np.int32)
    covered = (np.abs(2 * (pixel[None, None, :] - x)) < size) & (np.abs(2 * (pixel[None, :, None] - y)) < size)
    return covered[..., None]


def draw(shape: Callable[[np.ndarray, np.ndarray], np.ndarray], keys: np.ndarray) -> np.ndarray:
    """Images of one shape: uint8 [n, SIDE, SIDE, 3] for uint64 keys [n]."""
    choices = Choices(keys)
    ground = choices.colour()
    # half a turn around each channel's range, give or take: a strong contrast that is as often up as down
    ink = (ground + 96 + np.stack([choices.integers(0, 64) for _ in range(3)], axis=-1)) % 256
    image = _gradient(ground, choices)
    for _ in range(3):
        image = np.where(_square(choices, 2, 6), choices.colour(), image)
    cover = _cover(shape, choices)[..., None]
    image = (image * (4 - cover) + _gradient(ink, choices) * cover) >> 2
    image = np.where(_square(choices, 5, 9), choices.colour(), image)
    return np.clip(image + choices.noise(16), 0, 255).astype(np.uint8)


def synthetic_split(count: int, seed: int = 0, split: int = 0) -> Split:
    """``count`` images 32 x 32; image i is of class i % 10. ``split``: 0 for training, 1 for the test."""
    images = np.empty((count, SIDE, SIDE, 3), np.uint8)
    stream = splitmix(splitmix(np.array([seed], np.uint64)) + np.uint64(split))
    keys = splitmix(stream + (np.arange(count, dtype=np.uint64) << np.uint64(8)))
    labels = np.arange(count, dtype=np.int64) % len(CLASSES)
    for number, shape in enumerate(SHAPES.values()):
        members = np.arange(number, count, len(CLASSES))
        for start in range(0, len(members), CHUNK):
            chunk = members[start : start + CHUNK]
            images[chunk] = draw(shape, keys[chunk])
    return Split(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels))


def read(root: Path) -> Parts:
    """The whole set; nothing is read from ``root``."""
    train, test = (synthetic_split(size, split=number) for number, size in enumerate(SIZES))
    return make_parts({"train": train, "test": test}, CLASSES)
