import os

import numpy as np
import pytest
import torch
from support_data import write_image_folder

from fastres import data
from fastres.data import folder


@pytest.fixture
def images(tmp_path):
    write_image_folder(tmp_path / "insects")
    return tmp_path / "insects"


@pytest.fixture
def decoded(monkeypatch):
    """How often images were decoded."""
    calls, read_images = [], folder.read_images
    monkeypatch.setattr(
        folder, "read_images", lambda *args, **kwargs: calls.append(args) or read_images(*args, **kwargs)
    )
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
    (file,) = (tmp_path / "cache" / "fastres").iterdir()
    return file


def test_decodes_once(tmp_path, images, decoded):
    first = data.load(images)
    assert len(decoded) == 2
    second = data.load(images)
    assert len(decoded) == 2
    assert same(first, second)
    assert second.train.images.is_contiguous(memory_format=torch.channels_last)
    assert cache_file(tmp_path).suffix == ".npz"


def test_sizes_are_kept_apart(images, decoded):
    assert data.load(images, image_size=16).train.images.shape[-1] == 16
    assert data.load(images, image_size=24).train.images.shape[-1] == 24
    assert data.load(images, image_size=16).train.images.shape[-1] == 16
    assert len(decoded) == 4


def test_a_changed_folder_is_decoded_again(tmp_path, images, decoded):
    data.load(images)
    (images / "train" / "ant" / "0000.png").unlink()
    changed = data.load(images)
    assert len(decoded) == 4 and len(changed.train) == 5
    file = images / "train" / "ant" / "0001.png"
    os.utime(file, ns=(1, 1))
    data.load(images)
    assert len(decoded) == 6
    data.load(images)
    assert len(decoded) == 6
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
    assert again == []
    assert all(f"warning: cache file {file} cannot be used" in line for line in said)


def test_a_damaged_cache_is_rebuilt_with_a_warning(tmp_path, images, decoded):
    first = data.load(images)
    file = cache_file(tmp_path)
    whole = file.read_bytes()
    for damage in (whole[:-1000], b"", b"\0" * 5000, whole[:5000] + b"\xff" * 100 + whole[5100:]):
        file.write_bytes(damage)
        said, before = [], len(decoded)
        assert same(first, data.load(images, say=said.append))
        assert len(decoded) == before + 2
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
    assert not (tmp_path / "trace").exists() and len(said) == 1


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path, images, decoded):
    (tmp_path / "blocked").write_text("a file where the folder should be")
    said = []
    dataset = data.load(images, cache=tmp_path / "blocked", say=said.append)
    assert len(dataset.train) == 6
    assert len(said) == 1 and said[0].startswith("warning: cannot keep decoded images in")


def test_a_full_disk_costs_a_warning(tmp_path, images, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastres.data.cache.atomic_write", full)
    said = []
    assert len(data.load(images, say=said.append).train) == 6
    assert len(said) == 1 and "No space left" in said[0]


def test_no_cache(tmp_path, images, decoded):
    data.load(images, cache=False)
    data.load(images, cache=False)
    assert len(decoded) == 4 and not (tmp_path / "cache").exists()
