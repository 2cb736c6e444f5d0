"""The photos that fine-tuning is shown on: every shape is drawn, seen upright, and the same for the same seed."""

import numpy as np
import pytest

from bench import finetune
from fastres import data


@pytest.mark.parametrize("kind", [*finetune.SOURCE, *finetune.TARGET])
def test_every_shape_is_drawn_on_its_ground(kind):
    one, same, other = (finetune.draw_photo(kind, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert one.tobytes() == same.tobytes() and one.tobytes() != other.tobytes()
    inks = [count for count, _ in one.getcolors(maxcolors=one.width * one.height)]
    assert 0.02 < max(inks) / (one.width * one.height) < 0.6  # the shape has one colour, the ground many


def test_folders_are_read_with_photos_upright(tmp_path):
    folder = finetune.draw_folder(tmp_path / "photos", ("disc", "star"), 4, 2, seed=0)
    found = data.load(folder, image_size=64, cache=False, say=lambda line: None)
    assert found.classes == ("disc", "star") and (len(found.train), len(found.test)) == (8, 4)
    again = finetune.draw_folder(tmp_path / "again", ("disc", "star"), 4, 2, seed=0)
    assert data.load(again, image_size=64, cache=False, say=lambda line: None).digest == found.digest
