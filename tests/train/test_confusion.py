import csv

import pytest
import torch
from PIL import Image
from torch import nn

from fastres.data import Batches, Split
from fastres.train.confusion import Confusion, confusion, write_confusion


class Fixed(nn.Module):
    """Logits that are the image's first row of pixels."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, images):
        return images[:, 0, 0]


def test_counts(tmp_path):
    classes, generator = 7, torch.Generator().manual_seed(0)
    images = torch.randint(256, (50, 3, 7, 7), generator=generator, dtype=torch.uint8)
    labels = torch.randint(classes - 1, (50,), generator=generator)  # the last class has no image
    batches = Batches(Split(images, labels), 20, (0.0,) * 3, (1.0,) * 3, train=False)
    found = confusion(Fixed(), batches, classes, torch.float32)
    logits = images[:, 0, 0].float()
    expected = torch.zeros(classes, classes, dtype=torch.int64)
    for label, guess in zip(labels, logits.argmax(1)):
        expected[label, guess] += 1
    assert torch.equal(found.counts, expected)
    assert found.accuracy == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    hits = [label in row.topk(5).indices for row, label in zip(logits, labels)]
    assert found.top5 == pytest.approx(sum(hits) / 50)
    assert found.per_class[-1] is None and found.per_class[0] == expected[0, 0].item() / expected[0].sum().item()


def test_files(tmp_path):
    names = ["a,b", "$c_$", "d"]
    found = Confusion(torch.tensor([[3, 1, 0], [0, 2, 2], [0, 0, 0]]), 1.0)
    write_confusion(tmp_path / "new", found, names, "$5_ and 50%")
    rows = list(csv.reader((tmp_path / "new" / "confusion.csv").open()))
    assert rows == [["class", *names], ["a,b", "3", "1", "0"], ["$c_$", "0", "2", "2"], ["d", "0", "0", "0"]]
    rows = list(csv.reader((tmp_path / "new" / "classes.csv").open()))
    assert rows[1:] == [["a,b", "4", "0.750000"], ["$c_$", "4", "0.500000"], ["d", "0", ""]]
    assert Image.open(tmp_path / "new" / "confusion.png").size[0] > 100
    assert found.line(names) == "least: $c_$ 50.0%, a,b 75.0%"
