"""Sections of what a GPU took."""

import json

from bench.report import measured

MACHINE = {"device": "Some GPU", "date": "2026-01-01", "commit": "c", "versions": {"torch": "2.0"}}


def case(**milliseconds):
    variants = {name.replace("_", " "): {"seconds": {"median": one / 1e3}} for name, one in milliseconds.items()}
    return {"model": "resnet50", "batch": 8, "image_size": 224, "variants": variants}


def written(folder, device="Some GPU", **cases):
    record = {**MACHINE, "device": device, "cases": {name.replace("_", " "): one for name, one in cases.items()}}
    (folder / "models.json").write_text(json.dumps(record))


def test_the_best_of_each_are_compared(tmp_path):
    assert measured.steps_section(tmp_path) is measured.headline(tmp_path) is None
    first = case(eager=9, fused=4, fused_Triton=3)
    written(
        tmp_path, **{"resnet50_224_|_fused": first, "resnet50_224_|_compile": case(eager=9, compile=6, fused_graph=2)}
    )
    section = measured.steps_section(tmp_path)
    assert section.endswith("| resnet50, batch 8, 224 pixels | 9.00 | 6.00 |  | 3.00 | 4.00 | 2.00 | 3.00x | 4.50x |")
    words = "takes 2.0 ms, 3.00 times as fast as torch.compile's fastest, 4.50 times"
    assert words in measured.headline(tmp_path)


def test_a_way_that_some_run_lacks_has_a_column_where_it_was_measured(tmp_path):
    graphs = case(eager=9, compile=6, fused_graph=3, fused_graph_PDL=2)
    written(tmp_path, **{"resnet50_224_|_graphs": graphs, "notebook_|_graphs": case(eager=9, fused=3)})
    section = measured.steps_section(tmp_path)
    assert "| fused graph | fused graph PDL | best" in section
    assert "| 3.00 | 2.00 | 3.00x | 4.50x |" in section and section.endswith("| 3.00 |  |  |  | 3.00x |")


def test_what_was_not_measured_is_not_compared(tmp_path):
    written(tmp_path, **{"resnet50_224_|_fused": case(eager=9, fused=4), "resnet50_224,_batch_2": case(eager=1)})
    assert measured.headline(tmp_path) is None
    assert measured.steps_section(tmp_path).endswith("| 9.00 |  |  |  | 4.00 |  |  | 2.25x |")
    written(tmp_path, "cpu", **{"resnet50_224_|_fused": case(eager=9, fused=4, compile=5)})
    assert measured.headline(tmp_path) is measured.steps_section(tmp_path) is None


def test_seconds_are_the_median_of_the_seeds(tmp_path):
    assert measured.seconds_sentence(tmp_path) is None
    curves = {
        str(seed): {"epochs": [{"train_seconds": 1.0}, {"train_seconds": one}]} for seed, one in enumerate((3, 5, 9))
    }
    for name, device in (("seeds-speed94-h100", "Some GPU"), ("seeds-speed94-cpu", "cpu")):
        record = {**MACHINE, "device": device, "preset": "speed94", "options": {}, "curves": curves}
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    assert ": `speed94` in 5.0 s of training" in measured.seconds_sentence(tmp_path)


def test_launches_stand_beside_the_models(tmp_path):
    path = tmp_path / "launches.json"
    assert measured.launches_section(path) is None
    row = {
        "kernel": "conv",
        "launches": 2,
        "measured": 3e-3,
        "model": 2e-3,
        "bytes": 1e-3,
        "tensor": 1e-4,
        "least": 1e-3,
    }
    network = {"batch": 8, "kinds": [row], "total": {**row, "kernel": "all"}}
    path.write_text(json.dumps({"measured": MACHINE, "networks": {"resnet50 | fused Triton": network}}))
    section = measured.launches_section(path)
    assert "**resnet50**, 8 images, 2 launches: 1.50 of the model's time" in section
    assert section.endswith("| all | 2 | 3.00 | 2.00 | 1.00 | 0.10 | 1.50 | 3.00 | 2.00 |")
