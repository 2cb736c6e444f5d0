"""Folders as people have them: which files are read, as what, and what is said about the rest."""

import os
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image
from support_data import write_image_folder

from fastres import data
from fastres.data import DataError


def save(path, value=0, size=(16, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value,) * 3).save(path)


def flat(root, count=10, classes=("ant", "bee")):
    for number, name in enumerate(classes):
        for i in range(count):
            save(root / name / f"{i:02}.png", 100 * number + i)


def load(path, **options):
    said = []
    return data.load(path, say=said.append, **options), said


@pytest.mark.parametrize(
    "train, test", [("train", "val"), ("Train", "Valid"), ("training", "validation"), ("train", "testing")]
)
def test_names_of_splits(tmp_path, train, test):
    written = write_image_folder(tmp_path)
    (tmp_path / "train").rename(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / train)
    (tmp_path / "test").rename(tmp_path / test)
    (tmp_path / "notes").mkdir()
    dataset, _ = load(tmp_path)
    assert (len(dataset.train), len(dataset.test), dataset.val) == (6, 4, None)
    np.testing.assert_array_equal(dataset.test.images[0].permute(1, 2, 0).numpy(), written["test", "ant"][0])
    assert dataset.validation is dataset.test


def test_two_folders_of_one_meaning(tmp_path):
    write_image_folder(tmp_path)
    save(tmp_path / "val" / "ant" / "a.png")
    save(tmp_path / "valid" / "ant" / "a.png")
    with pytest.raises(DataError, match="has both 'val' and 'valid', which mean the same"):
        load(tmp_path)


def test_a_test_set_beside_a_validation_set_picks_nothing(tmp_path):
    write_image_folder(tmp_path)
    for name in ("ant", "bee"):
        save(tmp_path / "val" / name / "a.png", 7, (32, 32))
    dataset, _ = load(tmp_path)
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (6, 2, 4)
    assert dataset.validation is dataset.val and (dataset.val.images == 7).all()


def test_a_share_is_kept_of_each_class(tmp_path):
    flat(tmp_path, 10)
    for i in range(20):
        save(tmp_path / "cow" / f"{i}.png", 200 + i)
    with pytest.raises(DataError, match="is flat, CLASS/IMAGE: .* --val-share 0.2"):
        load(tmp_path)
    dataset, _ = load(tmp_path, val_share=0.2)
    assert dataset.test.labels.bincount().tolist() == [2, 2, 4] and dataset.train.labels.bincount().tolist() == [
        8,
        8,
        16,
    ]
    values = [set(split.images[:, 0, 0, 0].tolist()) for split in (dataset.train, dataset.test)]
    assert not values[0] & values[1] and len(values[0] | values[1]) == 40
    again, other = load(tmp_path, val_share=0.2)[0], load(tmp_path, val_share=0.2, val_seed=1)[0]
    assert torch.equal(dataset.test.images, again.test.images) and not torch.equal(
        dataset.test.images, other.test.images
    )
    assert dataset.mean == data.dataset.channel_statistics(dataset.train.images)[0]
    for share in (0, 1, 1.5, float("nan")):
        with pytest.raises(DataError, match="--val-share .* is not between 0 and 1"):
            load(tmp_path, val_share=share)
    save(tmp_path / "dog" / "1.png")
    with pytest.raises(DataError, match="class 'dog' has one image"):
        load(tmp_path, val_share=0.2)


def test_a_share_of_the_training_images_leaves_the_test_set_alone(tmp_path):
    write_image_folder(tmp_path, train=10)
    dataset, _ = load(tmp_path, val_share=0.3)
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (14, 6, 4)
    (tmp_path / "test").rename(tmp_path / "val")
    with pytest.raises(DataError, match="leave out --val-share 0.3"):
        load(tmp_path, val_share=0.3)


def test_a_class_may_be_called_train(tmp_path):
    flat(tmp_path, 4, ("bus", "train"))
    assert load(tmp_path, val_share=0.5)[0].classes == ("bus", "train")


def test_nested_folders_and_a_folder_around_all(tmp_path):
    write_image_folder(tmp_path / "in" / "deep")
    save(tmp_path / "in" / "deep" / "train" / "bee" / "2020" / "may" / "x.png", 7, (32, 32))
    dataset, _ = load(tmp_path)
    assert dataset.train.labels.tolist() == [0] * 3 + [1] * 4 and dataset.classes == ("ant", "bee")


def test_class_names_in_two_unicode_forms_are_one(tmp_path):
    name = "café"
    for split, form in (("train", "NFC"), ("test", "NFD")):
        for other in (unicodedata.normalize(form, name), "tea"):
            save(tmp_path / split / other / "a.png")
    assert load(tmp_path)[0].classes == (unicodedata.normalize("NFC", name), "tea")


def test_names_that_are_no_utf8_can_be_printed(tmp_path):
    write_image_folder(tmp_path)
    for split in ("train", "test"):
        os.rename(os.fsencode(tmp_path / split / "bee"), os.fsencode(tmp_path / split) + b"/b\xffe")
    (tmp_path / "train" / "ant" / "x.png").write_bytes(b"")
    os.rename(os.fsencode(tmp_path / "train" / "ant" / "x.png"), os.fsencode(tmp_path / "train" / "ant") + b"/\xfe.png")
    dataset, said = load(tmp_path, skip_bad=True)
    assert dataset.classes == ("ant", "b\\xffe")
    "\n".join([*said, *dataset.classes]).encode()


def test_what_is_left_out_is_counted_and_named(tmp_path):
    write_image_folder(tmp_path)
    ant = tmp_path / "train" / "ant"
    (ant / "labels.json").write_text("{}")
    (ant / "photo.heic").write_text("")
    (ant / "gone.png").symlink_to("nowhere.png")
    (ant / "around").symlink_to(tmp_path / "train")
    (ant / "self").symlink_to("self")
    os.mkfifo(ant / "pipe.png")
    save(tmp_path / "train" / "stray.png")
    (ant / ".DS_Store").write_text("")
    dataset, said = load(tmp_path)
    assert len(dataset.train) == 6
    for count, what, names in (
        (1, "files without an image's suffix", ["labels.json"]),
        (1, "HEIC images", ["photo.heic"]),
        (2, "broken links", ["gone.png", "self"]),
        (1, "links to a folder around them", ["around"]),
        (1, "not regular files", ["pipe.png"]),
        (1, "images outside a class folder", ["stray.png"]),
    ):
        (line,) = [line for line in said if what in line]
        assert f"{count} {what}" in line and all(name in line for name in names) and "\n" not in line
    assert not any("DS_Store" in line for line in said)


def test_links_to_files_and_folders_are_followed(tmp_path):
    write_image_folder(tmp_path / "store")
    for split in ("train", "test"):
        (tmp_path / "links" / split).mkdir(parents=True)
        for name in ("ant", "bee"):
            (tmp_path / "links" / split / name).symlink_to(tmp_path / "store" / split / name)
    assert len(load(tmp_path / "links")[0].train) == 6


def test_missing_splits_are_named(tmp_path):
    write_image_folder(tmp_path)
    (tmp_path / "train").rename(tmp_path / "other")
    with pytest.raises(DataError, match="has no folder 'train'"):
        load(tmp_path)
    (tmp_path / "other").rename(tmp_path / "train")
    (tmp_path / "test").rename(tmp_path / "other")
    with pytest.raises(DataError, match="has no folder 'test', nor 'val'.*--val-share"):
        load(tmp_path)


@pytest.mark.parametrize("split, other", [("train", "test"), ("test", "train")])
def test_classes_that_differ_are_named(tmp_path, split, other):
    write_image_folder(tmp_path)
    save(tmp_path / split / "fly" / "a.png")
    with pytest.raises(DataError, match=f"class 'fly' is in {tmp_path}/{split} but not in {tmp_path}/{other}"):
        load(tmp_path)
    (tmp_path / split / "fly" / "a.png").unlink()
    with pytest.raises(DataError, match=f"class folder {tmp_path}/{split}/fly holds no image"):
        load(tmp_path)


def test_one_class_is_too_few(tmp_path):
    write_image_folder(tmp_path, classes=("ant",))
    with pytest.raises(DataError, match="has 1 class folders: at least 2"):
        load(tmp_path)


@pytest.mark.parametrize(
    "sizes, asked, seen, stored",
    [
        ([(320, 240)] * 4, None, 224, 224),
        ([(320, 240)] * 4, 64, 64, 64),
        ([(16, 16)] + [(200, 200)] * 3, None, 200, 200),  # the first image is no measure
        ([(16, 16)] + [(200, 200)] * 3, 96, 96, 96),
        ([(28, 28)] * 4, None, 28, 28),
        ([(28, 28)] * 4, 32, 32, 28),  # the device enlarges
        ([(4, 4)] * 4, None, 8, 4),
        ([(30, 50), (50, 30), (40, 44), (44, 40)], None, 30, 30),
    ],
)
def test_one_rule_decides_the_size(tmp_path, sizes, asked, seen, stored):
    for split in ("train", "test"):
        for name in ("ant", "bee"):
            for i, size in enumerate(sizes):
                save(tmp_path / split / name / f"{i}.png", i, size)
    dataset, said = load(tmp_path, image_size=asked)
    assert dataset.image_size == seen and dataset.train.images.shape[-1] == dataset.test.images.shape[-1] == stored
    assert f"taken at {seen}x{seen}" in said[-1]


def load_test(path, **options):
    return data.load_test(path, "data", ["ant", "bee", "cow"], 16, 16, say=lambda line: None, **options)


def test_a_folder_of_tests_alone(tmp_path):
    for name, value in (("bee", 1), ("cow", 2)):  # not all classes
        save(tmp_path / "test" / name / "a.png", value)
    split, label = load_test(tmp_path)
    assert split.labels.tolist() == [1, 2] and split.images[:, 0, 0, 0].tolist() == [1, 2]
    assert load_test(tmp_path / "test")[0].labels.tolist() == [1, 2]
    save(tmp_path / "test" / "dog" / "a.png")
    with pytest.raises(DataError, match="tells apart ant, bee, cow, but .* the class 'dog'"):
        load_test(tmp_path)


def test_tests_take_the_very_images_that_were_kept(tmp_path):
    flat(tmp_path)
    dataset, _ = load(tmp_path, val_share=0.3, val_seed=5)
    split, _ = load_test(tmp_path, val_share=0.3, val_seed=5)
    assert torch.equal(split.images, dataset.test.images) and torch.equal(split.labels, dataset.test.labels)
    assert len(load_test(tmp_path)[0]) == 20
    (tmp_path / "train").mkdir()
    (tmp_path / "ant").rename(tmp_path / "train" / "ant")
    (tmp_path / "bee").rename(tmp_path / "train" / "bee")
    with pytest.raises(DataError, match="no images for tests"):
        load_test(tmp_path)
