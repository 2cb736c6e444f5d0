import numpy as np
import pytest
import torch
from PIL import Image
from support_data import write_image_folder

from fastres.data import DataError, read_images
from fastres.data.folder import list_images, read_image, read_image_folder


def test_reads_classes_sorted_by_name(tmp_path):
    written = write_image_folder(tmp_path, classes=("wasp", "ant", "bee"), train=3, test=2)
    (tmp_path / "train" / "ant" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / ".hidden").mkdir()
    train, test, classes = read_image_folder(tmp_path, 32)
    assert classes == ("ant", "bee", "wasp")
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    expected = np.stack([image for name in classes for image in written["train", name]])
    np.testing.assert_array_equal(train.images.permute(0, 2, 3, 1).numpy(), expected)
    assert train.images.is_contiguous(memory_format=torch.channels_last)


def test_more_images_than_one_task_keep_their_order(tmp_path):
    written = write_image_folder(tmp_path, train=150, test=1, size=(8, 8))
    train, _, _ = read_image_folder(tmp_path, 8)
    expected = np.stack(written["train", "ant"] + written["train", "bee"])
    np.testing.assert_array_equal(train.images.permute(0, 2, 3, 1).numpy(), expected)


@pytest.mark.parametrize(
    "size, crop", [((64, 40), (12, 0, 52, 40)), ((40, 65), (0, 12, 40, 52)), ((16, 20), (0, 2, 16, 18))]
)
def test_takes_the_central_square_and_resizes_it(tmp_path, size, crop):
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    expected = np.asarray(image.crop(crop).resize((32, 32), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", 32), expected)


def test_shrinking_is_antialiased(tmp_path):
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "a.png")
    inner = read_image(tmp_path / "a.png", 32)[:, 2:-2].astype(int)
    assert np.abs(inner - 127).max() < 3


@pytest.mark.parametrize(
    "mode, value, expected", [("L", 90, 90), ("RGBA", (10, 20, 30, 128), (10, 20, 30)), ("1", 1, 255)]
)
def test_other_modes_become_rgb(tmp_path, mode, value, expected):
    Image.new(mode, (8, 8), value).save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png", 8) == expected).all()


def test_a_large_jpeg_comes_close_to_its_full_decode(tmp_path):
    ramp = np.linspace(0, 255, 512).astype(np.uint8)
    Image.fromarray(np.stack([np.tile(ramp, (512, 1))] * 3, -1)).save(tmp_path / "a.jpg", quality=95)
    full = Image.open(tmp_path / "a.jpg").convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
    assert np.abs(read_image(tmp_path / "a.jpg", 32).astype(int) - np.asarray(full)).max() <= 3


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize(
    "damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b"", lambda raw: b"hello" * 100]
)
def test_a_damaged_image_is_named(tmp_path, suffix, damage):
    write_image_folder(tmp_path, train=80, test=1, size=(16, 16), suffix=suffix)
    file = tmp_path / "train" / "bee" / f"0070{suffix}"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match=f"image {file} cannot be read .*: replace or remove it") as error:
        read_image_folder(tmp_path, 16)
    assert "\n" not in str(error.value)


def test_an_image_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match="image .*none.png does not exist"):
        read_images([tmp_path / "none.png"], 8)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_missing_split_is_named(tmp_path, split):
    write_image_folder(tmp_path)
    (tmp_path / split).rename(tmp_path / "other")
    with pytest.raises(DataError, match=f"has no folder '{split}'"):
        list_images(tmp_path)


@pytest.mark.parametrize("split, other", [("train", "test"), ("test", "train")])
def test_classes_that_differ_are_named(tmp_path, split, other):
    write_image_folder(tmp_path)
    (tmp_path / split / "bee").rename(tmp_path / split / "fly")
    with pytest.raises(DataError, match=f"class '.*' is in {tmp_path}/train but not in {tmp_path}/test"):
        list_images(tmp_path)
    (tmp_path / split / "fly").rename(tmp_path / split / "bee")
    extra = tmp_path / split / "fly"
    extra.mkdir()
    (extra / "a.png").write_bytes(b"")
    with pytest.raises(
        DataError, match=f"class 'fly' is in {tmp_path}/{split} but not in {tmp_path}/{other}"
    ):
        list_images(tmp_path)


def test_an_empty_class_is_named(tmp_path):
    write_image_folder(tmp_path)
    for file in (tmp_path / "test" / "bee").iterdir():
        file.unlink()
    with pytest.raises(DataError, match="test/bee holds no image"):
        list_images(tmp_path)


def test_one_class_is_too_few(tmp_path):
    write_image_folder(tmp_path, classes=("ant",))
    with pytest.raises(DataError, match="has 1 class folders: at least 2"):
        list_images(tmp_path)
