import os
import shutil

import numpy as np
import pytest
import torch
from support_data import write_image_folder

from fastres import data
from fastres.data import dataset, decode


@pytest.fixture
def images(tmp_path):
    write_image_folder(tmp_path / "insects")
    return tmp_path / "insects"


@pytest.fixture
def decoded(monkeypatch):
    """How often images were decoded."""
    calls, original = [], decode.decode
    monkeypatch.setattr(decode, "decode", lambda *args, **kwargs: calls.append(args) or original(*args, **kwargs))
    return calls


def same(one, other):
    return (
        torch.equal(one.train.images, other.train.images)
        and torch.equal(one.test.images, other.test.images)
        and torch.equal(one.train.labels, other.train.labels)
        and torch.equal(one.test.labels, other.test.labels)
        and (one.classes, one.label, one.mean, one.std) == (other.classes, other.label, other.mean, other.std)
    )


def cache_file(tmp_path):
    (file,) = (tmp_path / "cache" / "fastres").glob("*.npz")
    return file


def test_decodes_once(tmp_path, images, decoded):
    first = data.load(images)
    assert len(decoded) == 1
    second = data.load(images)
    assert len(decoded) == 1
    assert same(first, second)
    assert second.train.images.is_contiguous(memory_format=torch.channels_last)
    assert cache_file(tmp_path).suffix == ".npz"


def test_digests_are_made_once_and_are_those_of_the_pixels(images, monkeypatch):
    """With the pixels in the cache file none is hashed again; what is changed in memory is another dataset."""
    hashed, original = [], dataset.image_digest
    monkeypatch.setattr(dataset, "image_digest", lambda image: hashed.append(1) or original(image))
    for options in ({}, {"val_share": 0.4}):
        first = data.load(images, **options)
        hashed.clear()
        again = data.load(images, **options)
        assert not hashed and again.digest == first.digest
        splits = [split for split in (again.train, again.test, again.val) if split is not None]
        assert dataset.content_digest(splits, again.classes) == again.digest and hashed
        again.train.images[0] += 1
        changed = dataset.make_dataset(again.train, again.test, again.classes, "x", again.val)
        assert changed.digest != again.digest


def test_sizes_are_kept_apart(images, decoded):
    assert data.load(images, image_size=16).train.images.shape[-1] == 16
    assert data.load(images, image_size=24).train.images.shape[-1] == 24
    assert data.load(images, image_size=16).train.images.shape[-1] == 16
    assert len(decoded) == 2


def test_files_that_were_moved_or_copied_are_not_decoded_again(tmp_path, images, decoded):
    first, said = data.load(images), []
    images.rename(tmp_path / "moved")
    (tmp_path / "link").symlink_to(tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", tmp_path / "copy")
    for name in ("moved", "link", "copy"):
        again = data.load(tmp_path / name, say=said.append)
        assert torch.equal(first.train.images, again.train.images) and len(decoded) == 1
    assert again.label == "image folder copy (6 images)"
    cache_file(tmp_path)  # one file for all
    (tmp_path / "copy" / "train" / "ant" / "0000.png").unlink()
    data.load(tmp_path / "copy")
    data.load(tmp_path / "moved")
    assert len(decoded) == 2


def test_other_pixels_in_files_of_the_same_names_sizes_and_times_are_decoded(tmp_path):
    loaded = []
    for seed in (0, 1):
        root = tmp_path / str(seed)
        write_image_folder(root, suffix=".bmp", seed=seed)
        for file in root.rglob("*.bmp"):
            os.utime(file, ns=(1, 1))
        loaded.append(data.load(root).train.images)
    assert not torch.equal(*loaded)
    for file in (tmp_path / "1" / "train").rglob("*.bmp"):  # rsync --times over the former ones
        file.write_bytes((tmp_path / "0" / file.relative_to(tmp_path / "1")).read_bytes())
        os.utime(file, ns=(1, 1))
    assert torch.equal(data.load(tmp_path / "1").train.images, loaded[0])


def test_a_damaged_entry_is_read_again_with_a_warning(tmp_path, images, decoded):
    first, said = data.load(images), []
    (entry,) = (tmp_path / "cache" / "fastres").glob("*.json")
    for damage in (b"", b"{", entry.read_bytes().replace(b'"largest": 32', b'"largest": 31')):
        entry.write_bytes(damage)
        assert same(first, data.load(images, say=said.append)) and len(decoded) == 1
    assert sum("cannot be used" in line for line in said) == 3


def test_a_changed_folder_is_decoded_again(tmp_path, images, decoded):
    data.load(images)
    (images / "train" / "ant" / "0000.png").unlink()
    changed = data.load(images)
    assert len(decoded) == 2 and len(changed.train) == 5
    file = images / "train" / "ant" / "0001.png"
    os.utime(file, ns=(1, 1))
    data.load(images)
    assert len(decoded) == 2  # its content is the same
    file.write_bytes((images / "train" / "ant" / "0002.png").read_bytes())
    assert not same(data.load(images), changed) and len(decoded) == 3
    cache_file(tmp_path)  # one file still


@pytest.mark.parametrize("place", [0.0, 0.01, 0.3, 0.6, 0.97, 0.999])
def test_a_flipped_bit_never_reaches_the_images(tmp_path, images, place):
    first, said = data.load(images), []
    file = cache_file(tmp_path)
    raw = bytearray(file.read_bytes())
    raw[int(place * len(raw))] ^= 16
    file.write_bytes(raw)
    assert same(first, data.load(images, say=said.append))
    again = []
    assert same(first, data.load(images, say=again.append))
    assert len(again) == 1  # the size that was taken
    assert all(f"warning: cache file {file} cannot be used" in line for line in said if "warning" in line)


def test_a_damaged_cache_is_rebuilt_with_a_warning(tmp_path, images, decoded):
    first = data.load(images)
    file = cache_file(tmp_path)
    whole = file.read_bytes()
    for damage in (whole[:-1000], b"", b"\0" * 5000, whole[:5000] + b"\xff" * 100 + whole[5100:]):
        file.write_bytes(damage)
        said, before = [], len(decoded)
        assert same(first, data.load(images, say=said.append))
        assert len(decoded) == before + 1
        said = [line for line in said if "taken at" not in line]
        assert len(said) == 1 and "cannot be used" in said[0] and "\n" not in said[0]
        assert file.read_bytes()[:4] == whole[:4]


def test_a_pickle_in_the_cache_is_not_obeyed(tmp_path, images):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trace"),)

    first = data.load(images)
    file = cache_file(tmp_path)
    with open(file, "wb") as stream:
        np.savez(stream, identity=np.array([Trap()], dtype=object))
    said = []
    assert same(first, data.load(images, say=said.append))
    assert not (tmp_path / "trace").exists() and len(said) == 2


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path, images, decoded):
    (tmp_path / "blocked").write_text("a file where the folder should be")
    said = []
    dataset = data.load(images, cache=tmp_path / "blocked", say=said.append)
    assert len(dataset.train) == 6
    assert len(said) == 2 and said[0].startswith("warning: cannot keep decoded images in")


def test_a_full_disk_costs_a_warning(tmp_path, images, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastres.data.cache.atomic_write", full)
    said = []
    assert len(data.load(images, say=said.append).train) == 6
    assert len(said) == 2 and "No space left" in said[0]


def test_no_cache(tmp_path, images, decoded):
    data.load(images, cache=False)
    data.load(images, cache=False)
    assert len(decoded) == 2 and not (tmp_path / "cache").exists()


def test_the_digest_is_of_the_content(tmp_path, images):
    first = data.load(images)
    images.rename(tmp_path / "renamed")
    renamed = data.load(tmp_path / "renamed")
    assert renamed.digest == first.digest and renamed.label != first.label
    one, other, between = (tmp_path / "renamed" / "train" / name for name in ("ant", "bee", "between"))
    one.rename(between), other.rename(one), between.rename(other)
    assert data.load(tmp_path / "renamed").digest != first.digest


def test_leftovers_of_kills_go(tmp_path, images):
    (tmp_path / "cache" / "fastres").mkdir(parents=True)
    left = tmp_path / "cache" / "fastres" / ".0.npz.abcd1234.tmp"
    left.touch()
    os.utime(left, (1, 1))
    data.load(images)
    assert not left.exists()
