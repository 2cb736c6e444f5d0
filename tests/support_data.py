"""Tiny image folders and CIFAR batches for tests, in every spelling that the readers must take."""

import hashlib
import pickle

import numpy as np
from PIL import Image

CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def write_image_folder(root, classes=("ant", "bee"), train=3, test=2, size=(32, 32), suffix=".png", seed=0):
    """Random images under ``root``; returns {(split, class): [uint8 H W 3, ...]}."""
    generator, written = np.random.default_rng(seed), {}
    for split, count in (("train", train), ("test", test)):
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            images = [generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8) for _ in range(count)]
            for number, image in enumerate(images):
                Image.fromarray(image).save(folder / f"{number:04}{suffix}")
            written[split, name] = images
    return written


def write_batches(folder, count=4, protocol=2, seed=0):
    """``cifar-10-batches-py`` with ``count`` images a file; returns (images [6*count, 3072], labels)."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (6 * count, 3072), dtype=np.uint8)
    labels = generator.integers(0, 10, 6 * count)
    for number, name in enumerate([f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"]):
        part = slice(number * count, (number + 1) * count)
        content = {b"data": images[part], b"labels": labels[part].tolist()}
        (folder / name).write_bytes(pickle.dumps(content, protocol))
    names = {b"label_names": [name.encode() for name in CIFAR_CLASSES]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names, protocol))
    return images, labels


def call_genuine(monkeypatch, folder):
    """Let torchvision take the files in ``folder`` for the published ones."""
    from torchvision.datasets import CIFAR10

    def with_checksum(name):
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    monkeypatch.setattr(CIFAR10, "train_list", [with_checksum(f"data_batch_{n}") for n in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [with_checksum("test_batch")])
    name, md5 = with_checksum("batches.meta")
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})


def python2_batch(images, labels):
    """A batch as Python 2's cPickle wrote the published ones: protocol 2, byte strings, numpy 1 names."""

    def string(raw):
        return b"T" + len(raw).to_bytes(4, "little") + raw

    def integer(value):
        return b"J" + int(value).to_bytes(4, "little", signed=True)

    dtype = b"cnumpy\ndtype\n" + string(b"u1") + b"K\x00K\x01\x87R(K\x03" + string(b"|") + b"NNN"
    dtype += integer(-1) + integer(-1) + b"K\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + string(b"b") + b"\x87R"
    array += b"(K\x01" + integer(images.shape[0]) + integer(images.shape[1]) + b"\x86"
    array += dtype + b"\x89" + string(images.tobytes()) + b"tb"
    numbers = b"](" + b"".join(map(integer, labels)) + b"e"
    return b"\x80\x02}(" + string(b"data") + array + string(b"labels") + numbers + b"u."
