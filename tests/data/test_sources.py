import dataclasses
import logging

import pytest
import torch
from support_data import CIFAR_CLASSES, call_genuine, write_batches, write_image_folder

from fastres import data
from fastres.data import DataError, cifar, download, registry, synthetic
from fastres.data.dataset import make_parts
from fastres.data.published import Published
from fastres.errors import FastresError
from fastres.train import TrainConfig
from fastres.train.useless import check_given


@pytest.fixture
def small_synthetic(monkeypatch):
    monkeypatch.setattr(synthetic, "SIZES", (40, 20))


def load(*args, **kwargs):
    said = []
    return data.load(*args, say=said.append, **kwargs), said


def test_synthetic(small_synthetic):
    dataset, _ = load("synthetic")
    assert dataset.label == "synthetic shapes (not CIFAR-10)"
    assert (len(dataset.train), len(dataset.test), len(dataset.classes)) == (40, 20, 10)


def test_a_new_set_is_a_line_in_the_registry(tmp_path, monkeypatch):
    def read(root):
        if not (root / "digits").is_dir():
            raise DataError(f"{root}/digits is missing: unpack digits.zip there")
        splits = {"train": synthetic.synthetic_split(20), "test": synthetic.synthetic_split(10, split=1)}
        return make_parts(splits, synthetic.CLASSES)

    monkeypatch.setitem(registry.DATASETS, "digits", registry.NamedSet("Digits", read))
    with pytest.raises(DataError, match="digits is missing: unpack"):
        load("digits", root=tmp_path)
    (tmp_path / "digits").mkdir()
    dataset, _ = load("digits", root=tmp_path)
    assert dataset.label == "Digits" and (len(dataset.train), len(dataset.test)) == (20, 10)


def test_a_new_set_that_is_published(tmp_path, monkeypatch):
    """It takes the cache and says what it does, as CIFAR-10's and CIFAR-100's entries do."""
    assert {"cifar10", "cifar100"} < registry.DATASETS.keys()
    kind = dataclasses.replace(cifar.CIFAR10, name="Other-10", folder="other")
    monkeypatch.setitem(registry.DATASETS, "other", Published(kind))
    monkeypatch.setattr(cifar, "is_genuine", lambda path, kind: True)
    write_batches(tmp_path / "other")
    assert load("other", root=tmp_path)[0].label == "Other-10"
    monkeypatch.setattr(cifar, "read_batches", None)
    assert load("other", root=tmp_path)[0].label == "Other-10"


@pytest.mark.parametrize("name", ["auto", "cifar10", "cifar100", "mine"])
def test_a_root_is_of_every_set_that_is_looked_for_there(name, monkeypatch):
    monkeypatch.setitem(registry.DATASETS, "mine", registry.NamedSet("Mine", synthetic.read))
    check_given([TrainConfig(data=name)], ["data_root"])
    with pytest.raises(FastresError, match="--data-root does nothing without --data auto or cifar10 or cifar100: add"):
        check_given([TrainConfig(data="synthetic")], ["data_root"])


def test_an_image_folder_by_path(tmp_path):
    write_image_folder(tmp_path / "insects", size=(20, 30))
    dataset, said = load(str(tmp_path / "insects"))
    assert dataset.label == "image folder insects (6 images)"
    assert dataset.classes == ("ant", "bee") and dataset.train.images.shape == (6, 3, 20, 20)
    assert said == [f"{tmp_path / 'insects'}: 10 images of 20 pixels, taken at 20x20; --image-size takes another size"]


@pytest.mark.parametrize("inside", [False, True])
def test_batches_by_path_or_parent(tmp_path, inside):
    _, labels = write_batches(tmp_path / cifar.CIFAR10.folder)
    dataset, _ = load(tmp_path / cifar.CIFAR10.folder if inside else tmp_path)
    assert dataset.label == "batches cifar-10-batches-py (20 images)"
    assert dataset.classes == tuple(CIFAR_CLASSES)
    assert dataset.test.labels.tolist() == labels[20:].tolist()


def test_batches_in_a_folder_of_another_name(tmp_path):
    write_batches(tmp_path / "mine")
    assert load(tmp_path / "mine")[0].label == "batches mine (20 images)"


def test_batches_are_cached_until_they_change(tmp_path, monkeypatch):
    write_batches(tmp_path / "mine")
    first, _ = load(tmp_path / "mine")
    reads, read_batches = [], cifar.read_batches
    monkeypatch.setattr(cifar, "read_batches", lambda *args: reads.append(args) or read_batches(*args))
    assert torch.equal(load(tmp_path / "mine")[0].train.images, first.train.images) and not reads
    write_batches(tmp_path / "mine", count=5)
    assert len(load(tmp_path / "mine")[0].train) == 25 and len(reads) == 1


def test_genuine_cifar10_is_called_so(tmp_path, monkeypatch):
    write_batches(tmp_path / cifar.CIFAR10.folder)
    call_genuine(monkeypatch, tmp_path / cifar.CIFAR10.folder)
    assert load("cifar10", root=tmp_path)[0].label == "CIFAR-10"
    assert load(tmp_path)[0].label == "CIFAR-10"


def test_cifar10_is_downloaded_when_absent(tmp_path, monkeypatch):
    write_batches(tmp_path / "elsewhere")
    call_genuine(monkeypatch, tmp_path / "elsewhere")

    def fetch(url, root, filename, md5):
        write_batches(tmp_path / "root" / cifar.CIFAR10.folder)

    monkeypatch.setattr(download, "reachable", lambda url, seconds: True)
    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", fetch)
    dataset, said = load("cifar10", root=tmp_path / "root")
    assert dataset.label == "CIFAR-10"
    assert said == [f"CIFAR-10 is not under {tmp_path / 'root'}: downloading it"]


def test_cifar10_takes_no_other_data(tmp_path):
    with pytest.raises(
        DataError, match=f"CIFAR-10 is not under {tmp_path}; .* out of reach: put {cifar.CIFAR10.folder}"
    ):
        load("cifar10", root=tmp_path)
    write_batches(tmp_path / cifar.CIFAR10.folder)
    with pytest.raises(DataError, match="has not the checksums of CIFAR-10; .* out of reach"):
        load("cifar10", root=tmp_path)
    (tmp_path / cifar.CIFAR10.folder / "data_batch_3").unlink()
    with pytest.raises(DataError, match="data_batch_3 is missing: .* out of reach"):
        load("cifar10", root=tmp_path)


def test_auto_takes_the_first_that_is_there(tmp_path, monkeypatch, small_synthetic):
    root = tmp_path / "root"

    dataset, (line,) = load(root=root)
    assert dataset.label == "synthetic shapes (not CIFAR-10)"
    assert line.startswith("data: synthetic shapes (not CIFAR-10); not taken: CIFAR-10 is not under")
    for reason in (
        "out of reach",
        f"not taken: no image folder {root}",
        f"not taken: no {root / cifar.CIFAR10.folder}",
    ):
        assert reason in line

    write_batches(root / cifar.CIFAR10.folder)
    dataset, (line,) = load(root=root)
    assert dataset.label.startswith("batches")
    assert "checksums of CIFAR-10" in line and "no image folder" in line

    write_image_folder(root)
    dataset, (*_, line) = load(root=root)
    assert dataset.label == "image folder root (6 images)"
    assert "checksums of CIFAR-10" in line

    call_genuine(monkeypatch, root / cifar.CIFAR10.folder)
    (tmp_path / "cache").rename(tmp_path / "former")
    assert [load(root=root)[0].label, load(root=root)[1]] == ["CIFAR-10", ["data: CIFAR-10"]]


def test_auto_does_not_hide_damage(tmp_path, small_synthetic):
    write_batches(tmp_path / cifar.CIFAR10.folder)
    (tmp_path / cifar.CIFAR10.folder / "data_batch_3").write_bytes(b"\x80\x02}")
    with pytest.raises(DataError, match="data_batch_3 is truncated"):
        load(root=tmp_path)
    write_image_folder(tmp_path)
    (tmp_path / "test" / "bee" / "0001.png").write_bytes(b"")
    with pytest.raises(DataError, match="0001.png cannot be read"):
        load(root=tmp_path)


def test_the_choice_is_logged_where_nobody_listens(tmp_path, small_synthetic, caplog):
    with caplog.at_level(logging.WARNING):
        data.load(root=tmp_path)
    assert "data: synthetic shapes (not CIFAR-10); not taken: CIFAR-10 is not under" in caplog.text


def test_an_unknown_source_is_named(tmp_path):
    with pytest.raises(DataError, match="data 'cifar1000' is not there: give auto, cifar10, cifar100, synthetic"):
        load("cifar1000")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(DataError, match="notes.txt' is neither a folder nor one of .zip"):
        load(tmp_path / "notes.txt")
    (tmp_path / "notes.txt").unlink()
    with pytest.raises(DataError, match="holds neither train/CLASS/IMAGE"):
        load(tmp_path)
    with pytest.raises(DataError, match="image size 0 must be at least 1"):
        load("synthetic", image_size=0)
