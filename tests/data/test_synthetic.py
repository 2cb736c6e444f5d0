import hashlib

import numpy as np
import torch
import torch.nn.functional as F

from fastres.data.synthetic import CLASSES, DIRECTIONS, SHAPES, splitmix, synthetic_split


def digest(split):
    pixels = split.images.permute(0, 2, 3, 1).contiguous().numpy().tobytes()
    return hashlib.sha256(pixels + split.labels.numpy().tobytes()).hexdigest()


def test_the_same_bytes_everywhere():
    assert digest(synthetic_split(200)) == "0acc75f3e2a5fd4b87c5fb9af300a26c7eba09fcc107d870b8ae09541070bca6"
    assert digest(synthetic_split(200, split=1)) == "e0874de93d3da91f7de6753f9f233b3a51e08e2cfa5275128684b094731f2887"


def test_splitmix_matches_the_published_generator():
    # first outputs of Vigna's splitmix64.c for the seed 1234567
    state = np.uint64(1234567) + np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert splitmix(state).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_no_direction_is_near_a_rounding_threshold():
    angle = 2 * np.pi * np.arange(64) / 64
    exact = 1024 * np.stack([np.cos(angle), np.sin(angle)])
    assert np.abs(np.abs(exact - np.floor(exact)) - 0.5).min() > 1e-6
    np.testing.assert_array_equal(np.stack([DIRECTIONS.real, DIRECTIONS.imag]), np.rint(exact))


def test_an_image_does_not_depend_on_how_many_are_drawn():
    few, many = synthetic_split(30), synthetic_split(90)
    assert torch.equal(few.images, many.images[:30])
    assert not torch.equal(few.images, synthetic_split(30, split=1).images)
    assert not torch.equal(few.images, synthetic_split(30, seed=1).images)


def test_classes_are_balanced():
    split = synthetic_split(200)
    assert split.labels.bincount().tolist() == [20] * 10
    assert split.images.shape == (200, 3, 32, 32)
    assert len(CLASSES) == 10


def test_every_shape_fits_its_circle_and_no_two_are_alike():
    v, u = np.mgrid[-400:401:8, -400:401:8].astype(np.int32)
    covers = [shape(u, v) for shape in SHAPES.values()]
    for name, cover in zip(SHAPES, covers):
        assert cover.any(), name
        assert not cover[u * u + v * v > 310 * 310].any(), name
    for one in range(10):
        for other in range(one):
            assert (covers[one] ^ covers[other]).sum() > 300, (CLASSES[one], CLASSES[other])


def test_a_linear_classifier_is_poor():
    train, test = synthetic_split(4000), synthetic_split(1000, split=1)

    def features(split):
        pooled = F.avg_pool2d(split.images.double() / 128 - 1, 2).flatten(1)
        return torch.cat([pooled, torch.ones(len(pooled), 1)], 1)

    x, target = features(train), F.one_hot(train.labels, 10).double()
    for ridge in (10.0, 1000.0):
        weights = torch.linalg.solve(x.T @ x + ridge * torch.eye(x.shape[1], dtype=torch.float64), x.T @ target)
        accuracy = ((features(test) @ weights).argmax(1) == test.labels).double().mean().item()
        assert accuracy < 0.35
