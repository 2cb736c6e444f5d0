"""A GPU's launches beside the model's: which are matched, what is told of those that are not, and the tables."""

import json

import pytest

from bench.launches import Launch, Specialisation
from bench.machine import compare, measured
from bench.machine.chips import CHIPS, LAUNCH
from bench.machine.fused import Timed
from bench.machine.measured import Measured, Pair, check, ours
from bench.machine.predict import Prediction
from bench.machine.program import Program
from bench.machine.work import Work

H100 = CHIPS[90]
SIZES = {"KH": 3, "KW": 3, "STRIDE": 1, "CIN": 64, "COUT": 128, "BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64}
INTEGERS = {"M": 4 * 64, "H": 8, "W": 8, "OH": 8, "OW": 8}
ATEN = ["void at::native::fill(int)", 9.0, [1, 1, 1], [128, 1, 1], 32, 0]
TRACE = [
    ATEN,
    ["conv_kernel", 30.0, [16, 1, 1], [256, 1, 1], 128, 8192],
    ["finalize_kernel", 6.0, [8, 1, 1], [512, 1, 1], 89, 2048],
    ATEN,
    ["global_avg_pool_kernel", 5.0, [4, 1, 1], [128, 1, 1], 32, 0],
    ["conv_kernel", 34.0, [16, 1, 1], [256, 1, 1], 128, 8192],
]


def launch(kernel, programs, integers, pointers=(), **constants):
    signature = (*((name, "constexpr") for name in constants), *((f"{name}_ptr", "*bf16") for name in pointers))
    values = tuple(((place,), value) for place, value in enumerate(constants.values()))
    return Launch(Specialisation("", kernel, signature, values, (), ()), (programs,), integers)


CONVOLUTION = launch("conv_kernel", 16, INTEGERS, ("x", "coef", "mean"), **SIZES)
RECORDED = [CONVOLUTION, launch("finalize_kernel", 8, {"T": 32}, C=128), CONVOLUTION]


def predicted(one, seconds):
    bytes_alone = round(10e-6 * H100.bandwidth)
    work = Work(one.programs, 1, bytes_alone, 0)
    return Timed(one, work, Prediction(seconds + LAUNCH, 1.0, 2, {}, 1.0))


@pytest.fixture
def step(monkeypatch):
    """Programs, and what the model says in the place of simulations: 20 us a convolution, 5 us to merge."""
    needs = {"conv_kernel": Program((), 128, 8192, 8), "finalize_kernel": Program((), 89, 2048, 16)}

    class Programs:
        arch = 90

        def __call__(self, one):
            return needs[one.kernel]

    def timed(launches, programs, chip):
        return [predicted(one, 20e-6 if one.specialisation.kernel == "conv_kernel" else 5e-6) for one in launches]

    monkeypatch.setattr(measured, "step_of", lambda workload, arch: RECORDED)
    monkeypatch.setattr(measured, "timed", timed)
    monkeypatch.setattr(compare, "Compiler", lambda arch: Programs())
    return needs


def result(rows, name="notebook | fused Triton"):
    case = {"batch": 4, "image_size": 8, "kernels": {"in_order": rows}}
    facts = {"device": "some GPU", "date": "2026-11-26", "commit": "now", "versions": {"triton": "3.6.0"}}
    eager = {"batch": 4, "image_size": 8, "kernels": {"launches": 3}}
    return {**facts, "cases": {"notebook | eager": eager, "notebook | fused": {"error": "no"}, name: case}}


def test_a_trace_has_the_projects_kernels_in_order_beside_others():
    """Of the project's own those that a step leaves out on purpose are left out too."""
    found = ours(TRACE)
    assert [one.kernel for one in found] == ["conv_kernel", "finalize_kernel", "conv_kernel"]
    assert found[2].microseconds == 34.0
    check(found, RECORDED)


@pytest.mark.parametrize(
    "place, row, words",
    [
        (1, ["merge_kernel", 6.0, [8, 1, 1], [512, 1, 1], 89, 2048],
         "launch 2: the GPU ran merge_kernel of 8x1x1 programs, recorded here is finalize_kernel of 8x1x1 programs"),
        (2, ["conv_kernel", 6.0, [17, 1, 1], [256, 1, 1], 128, 8192], "launch 3: the GPU ran conv_kernel of 17x1x1"),
        (2, None, "launch 3: the GPU ran nothing more, recorded here is conv_kernel of 16x1x1 programs, of 2 and 3"),
        (3, ["conv_kernel", 6.0, [16, 1, 1], [256, 1, 1], 128, 8192], "launch 4: the GPU ran conv_kernel"),
    ],
)  # fmt: skip
def test_the_first_other_launch_is_named(place, row, words):
    rows = ours(TRACE)
    rows[place : place + 1] = [Measured(*row)] if row else []
    with pytest.raises(ValueError, match=words):
        check(rows, RECORDED)


def test_like_launches_are_a_row_with_what_lies_above_the_bytes(step, tmp_path, capsys):
    path, out = tmp_path / "step.json", tmp_path / "compared.json"
    path.write_text(json.dumps(result(TRACE)))
    compare.main([str(path), "--json", str(out)])
    (found,) = json.loads(out.read_text())["networks"].values()
    conv, merging = found["classes"]
    assert (conv["launches"], conv["channels"], conv["of"], conv["with"]) == (2, "64 to 128", "8 px", ["coef", "mean"])
    assert (merging["kernel"], merging["channels"], merging["of"]) == ("finalize", "128", "32 rows")
    assert conv["measured"] == pytest.approx(64e-6) and conv["model"] == pytest.approx(40e-6)
    assert found["total"]["measured"] == pytest.approx(70e-6) and found["other_code"] == 0
    text = capsys.readouterr().out
    row = (
        "| conv 3x3 | 64 to 128 | 8 px | coef mean | 128x64x64 | 128 | 2 | 2 | 32.0 | 20.0 | 10.0 | 0.0 | 1.60 | 3.20 |"
    )
    assert f"{row} 0.04 |" in text and "| merging | 1 | 0.01 |" in text and "| all | 3 | 0.07 |" in text
    assert "other code" not in text


def test_another_code_than_the_gpus_is_told(step, tmp_path, capsys):
    step["finalize_kernel"] = Program((), 96, 2048, 16)
    path = tmp_path / "step.json"
    path.write_text(json.dumps(result(TRACE)))
    compare.main([str(path)])
    assert "1 launches have other code than is predicted here" in capsys.readouterr().out


@pytest.mark.parametrize(
    "record, words",
    [
        (result(TRACE[:3]), "notebook | fused Triton, launch 3: the GPU ran nothing more"),
        (result(TRACE, "some net | fused Triton"), "some net | fused Triton: the campaign has no such network"),
        ({"cases": {}}, "no case has its launches in order"),
    ],
)
def test_what_cannot_be_compared_ends_in_one_line(step, tmp_path, record, words):
    path = tmp_path / "step.json"
    path.write_text(json.dumps(record))
    with pytest.raises(SystemExit) as end:
        compare.main([str(path)])
    assert words in str(end.value) and "\n" not in str(end.value)


def test_a_pair_has_the_longer_of_bytes_and_product():
    one = Timed(CONVOLUTION, Work(16, 1, 3, round(7e-6 * H100.peak)), Prediction(9e-6, 1.0, 1, {}, 1.0))
    pair = Pair(Measured("conv_kernel", 21.0, [16], [256], 128, 8192), one, Program((), 128, 8192, 4))
    seconds = pair.seconds(H100)
    assert seconds["least"] == seconds["tensor"] == pytest.approx(7e-6)
    assert seconds["model"] == pytest.approx(9e-6 - LAUNCH) and not pair.same_code
