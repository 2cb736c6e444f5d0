"""Predictions as they are shown."""

import json

import pytest

from bench.machine import tables
from bench.report import predicted

STEP = {
    "Triton": 0.060, "Triton tiles": 0.055, "fused tuned": 0.040, "fused plain": 0.042, "compiled tuned": 0.044,
    "compiled plain": 0.048, "eager tuned": 0.050, "eager plain": 0.055,
}  # fmt: skip
ROW = {
    "kernel": "conv 1x1", "cin": 64, "cout": 256, "with": ["coef", "mean"], "tile": [128, 128, 64], "registers": 168,
    "resident": 1, "launches": 3, "seconds": 5.6e-4, "bytes": 1.8e-4, "tensor": 3e-5, "share": 0.31,
    "busy": {"shared memory": 0.6, "issue": 0.5, "alu": 0.4},
}  # fmt: skip
FOUND = {
    "network": "resnet50", "batch": 256, "dtype": "bfloat16", "chip": {"name": "H100"}, "bytes": 0.027, "ranks": 1,
    "steps": {"assumed": STEP, "slower L2": {**STEP, "Triton": 0.066}},
    "kinds": [{"kind": "conv 1x1", "launches": 3, "seconds": 0.04, "bytes": 0.01, "tensor": 0.001, "least": 0.012},
              {"kind": "merging", "launches": 9, "seconds": 0.01, "bytes": 0.0, "tensor": 0.0, "least": 0.0}],
    "convolutions": [{**ROW, "cout": 128}, ROW],
}  # fmt: skip


def test_ranges_are_over_assumptions_and_both_ends_of_the_library():
    cells = dict(zip(tables.STEPS, tables.step_cells(FOUND)))
    assert cells["Triton alone, ms"] == "60.0 to 66.0"
    assert cells["torch.compile"] == "44.0 to 48.0"
    assert cells["torch.compile / Triton alone"] == "0.67x to 0.80x"
    assert cells["torch.compile / with timed choices"] == "1.10x to 1.14x"
    assert cells["bytes and tensor cores alone, ms"] == "27.0"


def test_kernels_by_their_share_of_the_step():
    assert tables.kind_rows(FOUND) == [
        ["conv 1x1", "3", "40.00", "80%", "12.00"],
        ["merging", "9", "10.00", "20%", "0.00"],
    ]
    assert "nothing was timed" in tables.summary(FOUND)


def test_sections_are_labelled_as_a_models(tmp_path):
    assert (
        predicted.steps_section(tmp_path)
        is predicted.kernels_section(tmp_path)
        is predicted.sharpest_section(tmp_path)
        is None
    )
    (tmp_path / "machine-resnet50-sm90.json").write_text(json.dumps(FOUND))
    for section in (predicted.steps_section, predicted.kernels_section, predicted.sharpest_section):
        assert section(tmp_path).startswith("**Predictions of a model, not measurements.**")
    (line,) = [line for line in predicted.sharpest_section(tmp_path).splitlines() if "conv 1x1" in line]
    assert "64 to 256" in line and "| 560 | 180 |" in line and "31%" in line


@pytest.mark.parametrize(
    "ways, words",
    [
        (None, "the first configuration and the library"),
        (["dy by a pass"], "the first configuration, the other ways in"),
    ],
)
def test_a_record_without_the_other_ways_does_not_claim_them(tmp_path, ways, words):
    record = FOUND if ways is None else {**FOUND, "ways": ways}
    (tmp_path / "machine-resnet50-sm90.json").write_text(json.dumps(record))
    assert words in predicted.steps_section(tmp_path)


@pytest.mark.parametrize("values, text", [([1.0, 1.001], "1.00x"), ([1.2, 0.9], "0.90x to 1.20x")])
def test_a_range_of_one_value_is_one(values, text):
    assert tables._range(values, "{:.2f}x") == text


def test_runs_are_a_table_and_a_line(tmp_path):
    assert predicted.runs_section(tmp_path) is predicted.runs_sentence(tmp_path) is None
    beside = {"optimizer": 9e-4, "head and loss": 1e-4, "batch": 1.2e-4}
    ends = {"blocks": {"low": 0.002, "high": 0.003}, "seconds": {"low": 3.1, "high": 4.26}}
    run = {"preset": "speed94", "steps": 1100, **ends, "beside": beside}
    (tmp_path / "runs-sm90.json").write_text(json.dumps({"chip": {"name": "H100"}, "runs": [run]}))
    section = predicted.runs_section(tmp_path)
    assert section.startswith(predicted.LABEL)
    assert section.endswith("| `speed94` | H100 | 1100 | 2.00 to 3.00 | 0.90 | 0.10 | 0.12 | 3.1 to 4.3 |")
    line = predicted.runs_sentence(tmp_path)
    assert "model predicts `speed94` 3.1 to 4.3 s of training" in line


BUSY = {"L2": 0.9, "issue": 0.5}
# As much as binds it, of a convolution on 132 multiprocessors, one program on each: 1.5 ms of bytes.
SLOW = {**ROW, "warps": 8, "shared": 100_000, "programs": 13200, "seconds": 3e-3, "bytes": 1.5e-3, "tensor": 1e-3,
        "share": 0.5, "busy": BUSY}  # fmt: skip


@pytest.mark.parametrize(
    "change, words",
    [
        ({"share": 0.8}, ""),
        ({"share": 0.79}, "L2 90%"),
        ({"share": 0.6, "tensor": 2e-3}, ""),
        ({"share": 0.59, "tensor": 2e-3}, "L2 90%"),
        ({"seconds": 8e-6}, "the gap between launches is 25%"),
        ({"programs": 100}, "100 programs, 132 run at once"),
        ({"programs": 128}, "L2 90%"),  # as many as there is room for
        ({"programs": 145}, "1.1 rounds of programs: the last one is not full"),
        ({"busy": {"L2": 0.7}}, "waits: 1 at once, as many as registers admit, L2 70%"),
        ({"busy": {"L2": 0.7}, "registers": 64}, "waits: 1 at once, as many as shared memory admit, L2 70%"),
    ],
)
def test_a_slow_convolution_says_why(change, words):
    """Each reason before those behind it; 168 registers of 8 warps leave no room for a second program."""
    row = {**SLOW, **change}
    assert tables.why_not(row, {"sms": 132, "registers": 65536}) == words
    assert tables.enough(row) == (words == "")


def test_every_slow_convolution_is_shown(tmp_path):
    chip = {"name": "H100", "sms": 132, "registers": 65536}
    record = {**FOUND, "chip": chip, "convolutions": [SLOW, {**SLOW, "share": 0.9}]}
    (tmp_path / "machine-resnet50-sm90.json").write_text(json.dumps(record))
    text = predicted.slow_section(tmp_path)
    assert text.startswith(predicted.LABEL) and "**resnet50**, H100: 1 of 2 kinds of launches reach it" in text
    assert text.endswith("| conv 1x1 | 64 to 256 | coef mean | 3 | 3000 | 1500 | 50% | L2 90% |")
    assert predicted.slow_section(tmp_path / "nowhere") is None


def test_the_redesign_is_shown_by_kernel(tmp_path):
    assert predicted.redesign_section(tmp_path) is None
    old = [{"kind": "conv 1x1", "launches": 5, "seconds": 0.06}, {"kind": "gone", "launches": 1, "seconds": 0.001}]
    before = {"networks": {"resnet50": {"commit": "abc", "kinds": old}}}
    (tmp_path / "before-redesign-sm90.json").write_text(json.dumps(before))
    (tmp_path / "machine-resnet50-sm90.json").write_text(json.dumps({**FOUND, "arch": 90, "commit": "def"}))
    assert predicted.redesign_section(tmp_path).splitlines()[2:] == [
        "**resnet50**, H100, Triton alone: commit abc, and def",
        "",
        "| kernel | launches before | ms before | launches | ms |",
        "| :-- | --: | --: | --: | --: |",
        "| conv 1x1 | 5 | 60.00 | 3 | 40.00 |",
        "| gone | 1 | 1.00 |  |  |",
        "| merging |  |  | 9 | 10.00 |",
        "| all | 6 | 61.00 | 12 | 50.00 |",
    ]
