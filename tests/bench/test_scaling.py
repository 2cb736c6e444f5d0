"""The predicted scaling: limits that arithmetic knows, and a page that holds what the script computes."""

import json

import pytest

from bench import scaling
from bench.record import RESULTS
from bench.scaling import BUCKET, Cluster, Network, all_reduce, step, volume
from bench.tables import fill

FREE = Cluster(latency=0.0, hop=0.0)


def test_volume():
    """ResNet-18 has 11.69 million parameters; its twenty BatchNorms have 4800 channels."""
    gradients, statistics = volume("resnet18")
    assert gradients == 4 * 11_689_512
    assert len(statistics) == 20 and sum(backward for _, backward in statistics) == 16 * 4800


def test_all_reduce_of_a_node_and_of_many():
    """Each GPU sends almost twice the bytes inside, and its share of them almost twice between nodes."""
    assert all_reduce(8e9, 8, FREE) == pytest.approx(14e9 / FREE.link)
    assert all_reduce(8e9, 8192, FREE) == pytest.approx(14e9 / FREE.link + 2e9 / FREE.card, rel=1e-2)
    assert all_reduce(0, 64, Cluster()) == pytest.approx(Cluster().latency + 6 * Cluster().hop)


def test_backward_hides_all_but_the_last_bucket():
    long, short = (Network(4 * BUCKET, [(8, 8)], seconds, 0.0, 256) for seconds in (1.0, 1e-9))
    assert step(long, 8, 256, FREE)["gradients"] == pytest.approx(all_reduce(BUCKET, 8, FREE))
    assert step(short, 8, 256, FREE)["gradients"] == pytest.approx(all_reduce(4 * BUCKET, 8, FREE), rel=1e-3)


def test_launches_do_not_shrink():
    network = Network(4, [], 1.0, 0.25, 256)
    assert step(network, 8, 64, FREE)["compute"] == pytest.approx(0.25 + 0.75 / 4)
    assert step(network, 8, 64, FREE)["efficiency"] == pytest.approx(1.0)


def test_the_page_is_filled_in(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "a\n<!-- bench:volume -->\nold\n<!-- /bench:volume -->\nb\n<!-- bench:steps -->\n<!-- /bench:steps -->\nc\n"
    )
    scaling.main(["--page", str(page), "--out", str(tmp_path / "scaling.json")])
    text, found = page.read_text(), json.loads((tmp_path / "scaling.json").read_text())
    assert "old" not in text
    assert text.startswith("a\n<!-- bench:volume -->\n| a step of") and text.endswith("<!-- /bench:steps -->\nc\n")
    for name, gpus in (("resnet50", 1024), ("resnet110", 8)):
        assert f"| {name} | {gpus} | 256 |" in text
        assert found["predictions"][name]["gradients_bytes"] == volume(name)[0]


def test_the_page_stands_as_computed():
    """docs/distributed.md and scaling.json are of one run."""
    found = json.loads((RESULTS / "scaling.json").read_text())["predictions"]
    text = (RESULTS.parents[1] / "docs" / "distributed.md").read_text()
    assert fill(text, {"volume": scaling.volumes(found), "steps": scaling.steps(found)}) == text
