"""The rates of decoding: photos that are drawn, ways that are timed, steps that wait or do not."""

import json

from bench import decoding


def test_all_ways_are_timed_and_steps_wait_for_slow_decoding_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "SIZES", {"500 x 375": (500, 375)})
    monkeypatch.setattr(decoding, "SHARES", (0.1, 20.0))
    out = tmp_path / "decoding.json"
    decoding.main(f"--count 2 --seconds 0.01 --batch 2 --steps 4 --out {out}".split())
    found = json.loads(out.read_text())
    (row,) = found["decoding"]
    assert set(row["images_per_second"]) == {"central square, decoded whole", *decoding.VIEWS}
    assert all(rate > 0 for rate in row["images_per_second"].values())
    assert row["reduced_differs_by"]["mean"] == 0  # 375 pixels are less than twice 224
    fast, slow = (part["waited_share"] for part in found["waiting"])
    assert 0 <= fast < slow <= 1


def test_a_large_photo_is_decoded_at_a_fraction_with_little_difference(tmp_path):
    decoding.draw_folder(tmp_path, (1600, 1200), 2)
    split = decoding.load(tmp_path)
    _, apart = decoding.decoding(split, 0.01)
    assert 0 < apart["mean"] < 2 and apart["99.9%"] < 20
    assert decoding.whole(split, 0).shape == split.square(0).shape == (224, 224, 3)
    assert decoding.photo(64, 48, 1) == decoding.photo(64, 48, 1) != decoding.photo(64, 48, 2)


def test_rates_are_calls_a_second():
    assert decoding.rate(lambda n: None, 3, 0.01) > 1000
