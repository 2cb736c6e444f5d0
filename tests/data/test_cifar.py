import os
import pickle

import numpy as np
import pytest
import torch
from support_data import CIFAR_CLASSES, call_genuine, python2_batch, write_batches

from fastres import data
from fastres.data import DataError
from fastres.data.cifar import CIFAR10, CIFAR100, is_genuine, read_batches, unpickle


@pytest.mark.parametrize("protocol", range(6))
def test_reads_batches_of_every_protocol(tmp_path, protocol):
    images, labels = write_batches(tmp_path, protocol=protocol)
    train, test, classes = read_batches(tmp_path)
    assert classes == tuple(CIFAR_CLASSES)
    planes = torch.from_numpy(images).view(-1, 3, 32, 32)
    assert torch.equal(train.images, planes[:20]) and torch.equal(test.images, planes[20:])
    assert train.labels.tolist() == labels[:20].tolist() and test.labels.tolist() == labels[20:].tolist()
    assert train.images.is_contiguous(memory_format=torch.channels_last)


def test_reads_what_python_2_wrote(tmp_path):
    images, labels = write_batches(tmp_path)
    (tmp_path / "data_batch_2").write_bytes(python2_batch(images[4:8], labels[4:8]))
    theirs = pickle.loads((tmp_path / "data_batch_2").read_bytes(), encoding="bytes")
    np.testing.assert_array_equal(theirs[b"data"], images[4:8])  # the helper's bytes are a true pickle
    train, _, _ = read_batches(tmp_path)
    assert torch.equal(train.images, torch.from_numpy(images[:20]).view(-1, 3, 32, 32))
    assert train.labels.tolist() == labels[:20].tolist()


def test_reads_fortran_order(tmp_path):
    images, labels = write_batches(tmp_path)
    content = {"data": np.asfortranarray(images[:4]), "labels": labels[:4].tolist()}
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(content))
    assert torch.equal(read_batches(tmp_path)[0].images, torch.from_numpy(images[:20]).view(-1, 3, 32, 32))


class Call:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    "function, arguments, named",
    [
        (os.mkdir, ("trace",), "mkdir"),
        (eval, ("1",), "eval"),
        (getattr, ("text", "upper"), "getattr"),
        (np.dtype, ("O",), "'O'"),
    ],
)
def test_malicious_pickles_are_refused(tmp_path, monkeypatch, function, arguments, named, protocol):
    monkeypatch.chdir(tmp_path)
    write_batches(tmp_path)
    content = {"data": Call(function, *arguments), "labels": []}
    (tmp_path / "data_batch_3").write_bytes(pickle.dumps(content, protocol))
    with pytest.raises(DataError, match=f"data_batch_3 is .*unsafe.*{named}.*unpack https"):
        read_batches(tmp_path)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("name", CIFAR10.files)
def test_a_missing_file_is_named(tmp_path, name):
    write_batches(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=f"{name} is missing: unpack https"):
        read_batches(tmp_path)


@pytest.mark.parametrize("kept", [0, 1, 50, 5000, -1])
def test_a_truncated_file_is_named(tmp_path, kept):
    write_batches(tmp_path)
    file = tmp_path / "data_batch_4"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(DataError, match="data_batch_4 is truncated, damaged or unsafe .*unpack https") as error:
        read_batches(tmp_path)
    assert "\n" not in str(error.value)


IMAGES = np.zeros((3, 3072), np.uint8)


@pytest.mark.parametrize(
    "content, complaint",
    [
        ([1, 2], "holds a list, not a dictionary"),
        ({"labels": [0, 1, 2]}, "'data' is NoneType, not uint8"),
        ({"data": [0] * 3072, "labels": [0]}, "'data' is list"),
        (
            {"data": IMAGES[:, :3000], "labels": [0, 1, 2]},
            r"'data' is uint8 \[3, 3000\], not uint8 \[n, 3072\]",
        ),
        ({"data": IMAGES.astype(np.int64), "labels": [0, 1, 2]}, "'data' is int64"),
        ({"data": IMAGES[:0], "labels": []}, r"'data' is uint8 \[0, 3072\]"),
        ({"data": IMAGES}, "'labels' are not integers"),
        ({"data": IMAGES, "labels": ["a", "b", "c"]}, "'labels' are not integers"),
        ({"data": IMAGES, "labels": [0.0, 1.0, 2.5]}, "'labels' are not integers"),
        ({"data": IMAGES, "labels": [0, [1, 2], 3]}, "'labels' are not integers"),
        ({"data": IMAGES, "labels": [0, 1, 2**70]}, "'labels' are not integers"),
        ({"data": IMAGES, "labels": [0, 1]}, r"3 images but labels of shape \[2\]"),
        ({"data": IMAGES, "labels": [0, 1, 10]}, r"label 10 is outside 0\.\.9"),
        ({"data": IMAGES, "labels": [0, -1, 1]}, r"label -1 is outside 0\.\.9"),
    ],
)
def test_wrong_content_is_named(tmp_path, content, complaint):
    write_batches(tmp_path)
    (tmp_path / "test_batch").write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match=f"test_batch.*{complaint}.*unpack https"):
        read_batches(tmp_path)


@pytest.mark.parametrize("names", [None, ["a"] * 9, list(range(10))])
def test_wrong_class_names_are_named(tmp_path, names):
    write_batches(tmp_path)
    (tmp_path / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    with pytest.raises(DataError, match="batches.meta: 'label_names' is not a list of 10 names"):
        read_batches(tmp_path)


def test_an_array_that_lacks_bytes_is_damage(tmp_path):
    raw = python2_batch(IMAGES, [0, 1, 2]).replace((3).to_bytes(4, "little") + b"J", (4).to_bytes(4, "little") + b"J")
    (tmp_path / "batch").write_bytes(raw)
    with pytest.raises(DataError, match="truncated"):
        unpickle(tmp_path / "batch")


def test_only_torchvisions_checksums_are_genuine(tmp_path, monkeypatch):
    write_batches(tmp_path)
    assert not is_genuine(tmp_path)
    call_genuine(monkeypatch, tmp_path)
    assert is_genuine(tmp_path)
    (tmp_path / "data_batch_5").write_bytes(b"other")
    assert not is_genuine(tmp_path)


def test_cifar_100(tmp_path):
    kind = CIFAR100
    folder = tmp_path / kind.folder
    folder.mkdir()
    generator = np.random.default_rng(0)
    images, labels = generator.integers(0, 256, (30, 3072), dtype=np.uint8), generator.integers(0, 100, 30).tolist()
    for name, part in (("train", slice(0, 20)), ("test", slice(20, 30))):
        content = {b"data": images[part], b"fine_labels": labels[part], b"coarse_labels": [0] * 10}
        (folder / name).write_bytes(pickle.dumps(content, 2))
    names = [b"name %d" % i for i in range(100)]
    (folder / "meta").write_bytes(pickle.dumps({b"fine_label_names": names, b"coarse_label_names": [b"x"] * 20}, 2))
    for path in (folder, tmp_path):
        dataset = data.load(path)
        assert (dataset.label, len(dataset.classes)) == ("batches cifar-100-python (20 images)", 100)
        assert dataset.train.labels.tolist() + dataset.test.labels.tolist() == labels
        assert np.array_equal(dataset.train.images.reshape(20, -1).numpy(), images[:20])
    with pytest.raises(
        DataError, match="cifar-100-python has not the checksums of CIFAR-100; .*put cifar-100-python into"
    ):
        data.load("cifar100", root=tmp_path)
    (folder / "train").unlink()
    with pytest.raises(DataError, match="train is missing: unpack .*cifar-100-python.tar.gz again"):
        data.load(folder)
