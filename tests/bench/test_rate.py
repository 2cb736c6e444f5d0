"""The training rate's measurement: every combination, plausible figures."""

import json

from bench import rate


def test_every_combination_is_measured(tmp_path):
    out = tmp_path / "rate.json"
    options = "--presets fast --precisions fp32 bf16 --batch-size 8 --steps 2 --turns 2 --threads 1".split()
    rate.main([*options, "--out", str(out)])
    read = json.loads(out.read_text())
    assert [(row["preset"], row["precision"]) for row in read["rates"]] == [("fast", "fp32"), ("fast", "bf16")]
    for row in read["rates"]:
        assert row["images"] == 16 and len(row["turns"]) == 2
        rates = sorted(16 / one["seconds"] for one in row["turns"])
        assert rates[0] <= row["images_per_second"] <= rates[1]
        assert all(one["cpu_seconds"] > 0 for one in row["turns"])
