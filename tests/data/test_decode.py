import os

import numpy as np
import pytest
import torch
from PIL import Image
from support_data import write_image_folder

from fastres import data
from fastres.data import DataError, read_images
from fastres.data.decode import read_image


def test_reads_classes_sorted_by_name(tmp_path):
    written = write_image_folder(tmp_path, classes=("wasp", "ant", "bee"), train=3, test=2)
    (tmp_path / "train" / "ant" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / ".hidden").mkdir()
    said = []
    loaded = data.load(tmp_path, image_size=32, say=said.append)
    train, test, classes = loaded.train, loaded.test, loaded.classes
    assert "1 files without an image's suffix" in said[0] and "notes.txt" in said[0]
    assert classes == ("ant", "bee", "wasp")
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    expected = np.stack([image for name in classes for image in written["train", name]])
    np.testing.assert_array_equal(train.images.permute(0, 2, 3, 1).numpy(), expected)
    assert train.images.is_contiguous(memory_format=torch.channels_last)


def test_more_images_than_one_task_keep_their_order(tmp_path):
    written = write_image_folder(tmp_path, train=150, test=1, size=(8, 8))
    train = data.load(tmp_path, image_size=8).train
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
    "mode, value, expected", [("L", 90, 90), ("RGBA", (10, 20, 30, 255), (10, 20, 30)), ("1", 1, 255)]
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
@pytest.mark.parametrize("size", [(16, 16), (200, 150)])  # decoded at the first look, and later
@pytest.mark.parametrize("damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b"", lambda raw: b"hello" * 100])
def test_damaged_images_are_all_named_or_left_out(tmp_path, suffix, size, damage):
    written = write_image_folder(tmp_path, train=5, test=2, size=size, suffix=suffix)
    files = [
        tmp_path / place for place in (f"train/ant/0001{suffix}", f"train/bee/0004{suffix}", f"test/bee/0000{suffix}")
    ]
    for file in files:
        file.write_bytes(damage(file.read_bytes()))
    for _ in range(2):  # decoded, and from the cache
        with pytest.raises(DataError, match="3 images cannot be read: .* with --skip-bad") as error:
            data.load(tmp_path)
        assert all(str(file) in str(error.value) for file in files) and "\n" not in str(error.value)
    said = []
    rest = data.load(tmp_path, skip_bad=True, say=said.append)
    assert (len(rest.train), len(rest.test)) == (8, 3) and rest.train.labels.tolist() == [0] * 4 + [1] * 4
    assert "3 unreadable images" in said[-1] and all(str(file) in said[-1] for file in files)
    if suffix == ".png" and size == (16, 16):
        expected = np.stack([image for i, image in enumerate(written["train", "ant"]) if i != 1])
        np.testing.assert_array_equal(rest.train.images[:4].permute(0, 2, 3, 1).numpy(), expected)


def test_a_class_without_a_readable_image_is_named(tmp_path):
    write_image_folder(tmp_path, train=1)
    file = tmp_path / "train" / "bee" / "0000.png"
    file.write_bytes(b"")
    with pytest.raises(DataError, match=f"image {file} cannot be read .the file is empty.: replace or remove it"):
        data.load(tmp_path)
    with pytest.raises(DataError, match="class 'bee' has no image that can be read"):
        data.load(tmp_path, skip_bad=True)


def test_more_than_the_memory_is_refused(tmp_path, monkeypatch):
    write_image_folder(tmp_path)
    monkeypatch.setattr("os.sysconf", lambda name: 100)
    with pytest.raises(DataError, match="10 images of 32 pixels a side take .* lower --image-size"):
        data.load(tmp_path)


def test_an_image_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match="image .*none.png does not exist"):
        read_images([tmp_path / "none.png"], 8)


@pytest.mark.parametrize("kind", ["PostScript", "pipe", "bomb", "device"])
def test_what_would_run_or_wait_or_fill_memory_is_refused(tmp_path, kind):
    path = tmp_path / "a.png"
    if kind == "PostScript":
        path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "bomb":
        Image.new("1", (8000, 8000)).save(path)  # within Pillow's limit
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"a.png cannot be read \(.*\)") as stopped:
        read_images([path], 8)
    assert "\n" not in str(stopped.value)


def test_a_photo_of_a_large_camera_is_read(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((6000, 4000)).save(tmp_path / "a.jpg", quality=90)
    assert read_image(tmp_path / "a.jpg", 8).shape == (8, 8, 3)


def test_a_class_with_a_control_character(tmp_path):
    write_image_folder(tmp_path, classes=("ant", "b\x1b[2J"))
    with pytest.raises(DataError, match=r"class 'b\\x1b\[2J' has a control character in its name: rename it"):
        data.load(tmp_path)


def test_decoding_without_further_threads(tmp_path, monkeypatch):
    write_image_folder(tmp_path)
    paths = [tmp_path / "train" / "ant" / f"{number:04}.png" for number in range(3)]
    expected = read_images(paths, 8)

    def none_left(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", none_left)
    assert torch.equal(read_images(paths, 8), expected)
