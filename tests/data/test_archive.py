"""zip and tar archives: read as their folder is, whatever their names try."""

import io
import os
import tarfile
import zipfile

import pytest
import torch
from support_data import write_batches, write_image_folder

from fastres import data
from fastres.data import DataError, archive, cifar


def load(path, **options):
    said = []
    return data.load(path, say=said.append, **options), said


def pack(folder, target):
    """Pack a folder, as one folder in the archive."""
    if target.suffix == ".zip":
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as file:
            for path in sorted(folder.rglob("*")):
                file.write(path, path.relative_to(folder.parent))
    else:
        kind = target.suffix.removeprefix(".").replace("tgz", "gz")
        with tarfile.open(target, "w" if kind == "tar" else f"w:{kind}") as file:
            file.add(folder, folder.name)


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "a.tgz", "a.tar.bz2", "a.tar.xz"])
def test_archives_read_as_their_folder(tmp_path, name):
    write_image_folder(tmp_path / "insects", train=5)
    pack(tmp_path / "insects", tmp_path / name)
    expected, _ = load(tmp_path / "insects")
    found, _ = load(tmp_path / name)
    assert found.classes == expected.classes and found.label == f"image folder {name} (10 images)"
    for one, other in ((found.train, expected.train), (found.test, expected.test)):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
    assert len(list((tmp_path / "cache" / "fastres").glob("*.npz"))) == 1  # the content is the same
    split, _ = data.load_test(tmp_path / name, "data", ["ant", "bee"], 32, 32, say=lambda line: None)
    assert torch.equal(split.images, expected.test.images)


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_unsafe_names_are_left_out_and_nothing_is_written(tmp_path, kind):
    write_image_folder(tmp_path / "insects")
    pack(tmp_path / "insects", tmp_path / f"a.{kind}")
    raw = (tmp_path / "insects" / "train" / "ant" / "0000.png").read_bytes()
    names = [
        "../escaped.png",
        "/absolute.png",
        "insects/train/ant/../../../../up.png",
        "C:\\x\\y.png",
        "__MACOSX/._a.png",
    ]
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "a.zip", "a") as file:
            for name in names:
                file.writestr(name, raw)
    else:
        with tarfile.open(tmp_path / "a.tar", "a") as file:
            for name in names:
                info = tarfile.TarInfo(name)
                info.size = len(raw)
                file.addfile(info, io.BytesIO(raw))
    before = sorted(tmp_path.rglob("*.png"))
    dataset, said = load(tmp_path / f"a.{kind}", cache=False)
    assert len(dataset.train) == 6 and sorted(tmp_path.rglob("*.png")) == before
    (line,) = [line for line in said if "unsafe names (" in line]
    assert "4 unsafe names" in line and "escaped.png" in line


def test_links_in_a_tar_file(tmp_path):
    write_image_folder(tmp_path / "insects")
    ant = tmp_path / "insects" / "train" / "ant"
    os.link(ant / "0000.png", ant / "0007.png")
    (ant / "0008.png").symlink_to("0001.png")
    (ant / "0009.png").symlink_to("/etc/passwd")
    pack(tmp_path / "insects", tmp_path / "a.tar")
    dataset, said = load(tmp_path / "a.tar")
    assert dataset.train.labels.tolist() == [0] * 5 + [1] * 3
    assert torch.equal(dataset.train.images[3], dataset.train.images[0])
    assert torch.equal(dataset.train.images[4], dataset.train.images[1])
    assert any("1 broken links" in line and "0009.png" in line for line in said)


def test_bombs_are_refused(tmp_path, monkeypatch):
    write_image_folder(tmp_path / "insects")
    (tmp_path / "insects" / "train" / "ant" / "huge.png").write_bytes(bytes(3_000_000))
    for name in ("a.zip", "a.tar.gz"):
        pack(tmp_path / "insects", tmp_path / name)
    monkeypatch.setattr(archive, "LARGEST", 1_000_000)
    for name in ("a.zip", "a.tar.gz"):
        dataset, said = load(tmp_path / name)
        assert len(dataset.train) == 6 and any("files larger than" in line and "huge.png" in line for line in said)
    monkeypatch.setattr(archive, "SPARE", 1000)
    monkeypatch.setattr(archive, "RATIO", 3)
    with pytest.raises(DataError, match="a.tar.gz unpacks to more than 3 times its size"):
        load(tmp_path / "a.tar.gz", cache=False)


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz"])
def test_damaged_archives_are_named(tmp_path, name):
    write_image_folder(tmp_path / "insects", train=20)
    pack(tmp_path / "insects", tmp_path / name)
    raw = (tmp_path / name).read_bytes()
    for damage in (raw[: len(raw) // 2], b"", b"junk" * 300):
        (tmp_path / name).write_bytes(damage)
        with pytest.raises(DataError) as error:
            load(tmp_path / name, cache=False)
        assert name in str(error.value) and "\n" not in str(error.value)


def test_an_encrypted_archive_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("train/ant/a.png", b"x")
    raw = bytearray((tmp_path / "a.zip").read_bytes())
    raw[raw.index(b"PK\1\2") + 8] |= 1
    (tmp_path / "a.zip").write_bytes(raw)
    with pytest.raises(DataError, match="a.zip is encrypted"):
        load(tmp_path / "a.zip")


def test_the_published_archive_of_cifar(tmp_path):
    write_batches(tmp_path / cifar.CIFAR10.folder)
    pack(tmp_path / cifar.CIFAR10.folder, tmp_path / "cifar-10-python.tar.gz")
    expected, _ = load(tmp_path / cifar.CIFAR10.folder)
    for _ in range(2):
        found, _ = load(tmp_path / "cifar-10-python.tar.gz")
        assert torch.equal(found.train.images, expected.train.images)
        assert found.label == "batches cifar-10-python.tar.gz (20 images)"
