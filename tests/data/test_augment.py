import numpy as np
import pytest
import torch

from fastres.data import Augment, DataError, crop_and_flip, cutout, normalise, resize
from fastres.data.augment import draw, first_flips, shrink


def random_images(count, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 3, height, width), generator=generator, dtype=torch.uint8)
    return images.contiguous(memory_format=torch.channels_last)


def reference_crop(image, pad, top, left, mirror):
    """One image [3, H, W], by numpy."""
    _, height, width = image.shape
    padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)), mode="reflect")
    crop = padded[:, top : top + height, left : left + width]
    return crop[:, :, ::-1] if mirror else crop


@pytest.mark.parametrize("height, width, pad", [(32, 32, 4), (7, 5, 4), (6, 9, 1), (3, 3, 2)])
def test_crop_and_flip_matches_padding_image_by_image(height, width, pad):
    images = random_images(10, height, width)
    # every corner, mirrored and not
    top, left, mirror = (
        part.flatten()
        for part in torch.meshgrid(*(torch.arange(n) for n in (2 * pad + 1, 2 * pad + 1, 2)), indexing="ij")
    )
    index = torch.arange(len(top)) * 7 % 10
    out = crop_and_flip(images, index, pad, top, left, mirror.bool())
    assert out.dtype == torch.uint8 and out.is_contiguous(memory_format=torch.channels_last)
    for n in range(len(top)):
        expected = reference_crop(images[index[n]].numpy(), pad, int(top[n]), int(left[n]), bool(mirror[n]))
        np.testing.assert_array_equal(out[n].numpy(), expected)


def test_flip_alone_and_crop_alone():
    images, index = random_images(4, 6, 6), torch.tensor([3, 0, 3])
    mirror = torch.tensor([True, False, False])
    assert torch.equal(crop_and_flip(images, index, mirror=mirror)[0], images[3].flip(2))
    assert torch.equal(crop_and_flip(images, index, mirror=mirror)[1:], images[[0, 3]])
    middle = torch.full((3,), 2)
    assert torch.equal(crop_and_flip(images, index, 2, middle, middle), images[index])


@pytest.mark.parametrize("size", [1, 4, 5, 40])
def test_cutout_matches_image_by_image(size):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(50, 3, 9, 12, generator=generator).contiguous(memory_format=torch.channels_last) + 1
    y, x = torch.randint(9, (50,), generator=generator), torch.randint(12, (50,), generator=generator)
    expected = images.clone()
    for n in range(50):
        first_y, first_x = int(y[n]) - size // 2, int(x[n]) - size // 2
        expected[n, :, max(first_y, 0) : first_y + size, max(first_x, 0) : first_x + size] = 0
    out = cutout(images, y, x, size)
    assert torch.equal(out, expected) and (out == 0).any()
    assert out.is_contiguous(memory_format=torch.channels_last)


MEAN, STD = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)


@pytest.mark.parametrize(
    "dtype, tolerance",
    [(torch.float64, 1e-14), (torch.float32, 5e-7), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)],
)
def test_normalise(dtype, tolerance):
    images = random_images(5, 8, 8)
    before = images.clone()
    out = normalise(images, MEAN, STD, dtype)
    exact = np.stack([(images[:, c].numpy().astype(np.float64) - MEAN[c]) / STD[c] for c in range(3)], 1)
    np.testing.assert_allclose(out.double().numpy(), exact, atol=tolerance)
    assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before)


def test_normalise_leaves_float_input_alone():
    images = torch.full((1, 3, 2, 2), 100.0)
    normalise(images, MEAN, STD)
    assert (images == 100).all()


def reference_bilinear(row, size):
    """Half-pixel-centred linear resampling of one row, the kernel widened where it shrinks."""
    scale = len(row) / size
    reach = max(scale, 1.0)
    out = np.empty(size)
    for n in range(size):
        distance = np.abs(np.arange(len(row)) + 0.5 - (n + 0.5) * scale) / reach
        weight = np.clip(1 - distance, 0, None)
        out[n] = (weight * row).sum() / weight.sum()
    return out


@pytest.mark.parametrize("size", [8, 16, 31, 48])
def test_resize(size):
    images = random_images(2, 32, 32)
    out = resize(images, size)
    expected = np.apply_along_axis(reference_bilinear, 3, images.numpy().astype(np.float64), size)
    expected = np.apply_along_axis(reference_bilinear, 2, expected, size)
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-3)
    assert out.dtype == torch.float32 and out.is_contiguous(memory_format=torch.channels_last)


def test_resize_to_the_same_size_is_no_work():
    images = random_images(2, 8, 8)
    assert resize(images, 8) is images


def test_draws_cover_their_ranges():
    augment = Augment(crop_pad=2, flip="random", cutout=3)
    draws = draw(augment, 4000, 5, 7, torch.Generator().manual_seed(0))
    for values, count in (
        (draws.top, 5),
        (draws.left, 5),
        (draws.hole_y, 5),
        (draws.hole_x, 7),
        (draws.mirror.long(), 2),
    ):
        share = values.bincount().double() / 4000
        assert len(share) == count and (share - 1 / count).abs().max() < 0.03
    assert not torch.equal(draws.top, draws.left)
    nothing = draw(Augment(crop_pad=0), 4, 5, 7, torch.Generator())
    assert (nothing.top, nothing.left, nothing.mirror, nothing.hole_y, nothing.hole_x) == (None,) * 5


def test_first_flips_are_a_random_half():
    flips = first_flips(4000, torch.Generator().manual_seed(0))
    assert flips.dtype == torch.bool and 0.45 < flips.double().mean() < 0.55


@pytest.mark.parametrize(
    "values, complaint",
    [
        ({"crop_pad": -1}, "crop_pad -1 must be an integer of at least 0"),
        ({"crop_pad": 1.5}, "crop_pad 1.5"),
        ({"crop_pad": None}, "crop_pad None"),
        ({"cutout": -2}, "cutout -2 must be an integer of at least 0"),
        ({"resize": 0}, "resize 0 must be an integer of at least 1"),
        ({"flip": "vertical"}, "flip 'vertical' is unknown: choose from none, random, alternating"),
    ],
)
def test_augment_checks_its_values(values, complaint):
    with pytest.raises(DataError, match=complaint):
        Augment(**values)


@pytest.mark.parametrize("size", [8, 13, 24])
def test_shrink_is_resize_in_whole_pixel_values(size):
    images = random_images(4, 32, 32)
    out = shrink(images, size)
    assert out.dtype == torch.uint8 and out.shape == (4, 3, size, size)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert (out.float() - resize(images, size)).abs().max() <= 1.01
    assert shrink(images, 32) is images
