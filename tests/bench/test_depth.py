"""The depth measurement: shows the effect that it is there to show, and leaves whole results."""

import json

from bench import depth


def test_plain_gradients_drift_with_depth_and_residual_ones_do_not(tmp_path):
    out = tmp_path / "depth.json"
    depth.main(
        "--depths 14 50 --batch 16 --steps 2 --deep 20 --deep-batch 8 --deep-repeats 1 --checkpoint-every 2".split()
        + ["--out", str(out)]
    )
    read = json.loads(out.read_text())
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    spread = {}
    for twin in read["twins"]:
        assert len(twin["before"]) == len(twin["after"]) == twin["depth"] - 1 and len(twin["losses"]) == 2
        spread[twin["kind"], twin["depth"]] = max(twin["before"]) / min(twin["before"])
    assert spread["plain", 50] > 3 * spread["plain", 14]
    assert spread["plain", 50] > 10 * spread["residual", 50]
    for step in read["deep_steps"]:
        assert step["peak_mib"] > step["idle_mib"] > 0 and len(step["seconds"]) == 1
