import numpy as np
import pytest
import torch

from fastres.data import DataError, Split, limit
from fastres.data.dataset import channel_statistics, make_dataset


def random_split(count, size=8, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    return Split(images, torch.arange(count) % classes)


def test_images_become_channels_last():
    split = random_split(4)
    assert split.images.is_contiguous(memory_format=torch.channels_last)
    assert len(split) == 4
    assert split.to("cpu").images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "images, labels, complaint",
    [
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64), "float32"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), r"\[2, 1, 4, 4\]"),
        (
            torch.zeros(2, 3, 4, 4, dtype=torch.uint8),
            torch.zeros(3, dtype=torch.int64),
            r"int64 \[2\].*\[3\]",
        ),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int32), "int32"),
        (torch.zeros(0, 3, 4, 4, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64), "add images"),
    ],
)
def test_a_split_checks_its_tensors(images, labels, complaint):
    with pytest.raises(DataError, match=complaint):
        Split(images, labels)


def test_statistics_are_those_of_float64():
    images = random_split(50).images
    mean, std = channel_statistics(images)
    values = images.numpy().astype(np.float64)
    np.testing.assert_allclose(mean, values.mean(axis=(0, 2, 3)), rtol=1e-14)
    np.testing.assert_allclose(std, values.std(axis=(0, 2, 3)), rtol=1e-13)


def test_a_constant_channel_has_std_1():
    images = random_split(5).images.clone()
    images[:, 1] = 7
    mean, std = channel_statistics(images)
    assert (mean[1], std[1]) == (7, 1)


@pytest.mark.parametrize("label, named", [(3, "training label 3"), (-1, "training label -1")])
def test_labels_without_a_class_are_named(label, named):
    split = random_split(4)
    split.labels[2] = label
    with pytest.raises(DataError, match=f"{named} is outside 0..2"):
        make_dataset(split, random_split(3), ("a", "b", "c"), "set")


def test_limit_takes_a_fixed_part_and_says_so():
    dataset = make_dataset(random_split(300), random_split(60), ("a", "b", "c"), "set")
    part = limit(dataset, train=30, test=1000)
    assert (len(part.train), len(part.test)) == (30, 60)
    assert part.label == "set, 30 of 300 train images"
    assert part.mean == channel_statistics(part.train.images)[0]
    assert torch.equal(part.train.images, limit(dataset, train=30).train.images)
    pairs = {(i.numpy().tobytes(), int(n)) for i, n in zip(dataset.train.images, dataset.train.labels)}
    assert all((i.numpy().tobytes(), int(n)) in pairs for i, n in zip(part.train.images, part.train.labels))
    assert not torch.equal(part.train.images, dataset.train.images[:30])
    assert limit(dataset) == dataset
    with pytest.raises(DataError, match="limit of 0 train"):
        limit(dataset, train=0)
