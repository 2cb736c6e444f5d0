"""Kernels compile ahead of time for every architecture, without spills and onto the tensor cores."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import triton

from bench import aot
from bench.aot import Row, coverage
from bench.aot_plan import Task
from bench.launches import Launch
from bench.machine import floors
from bench.machine.floors import FLOORS, TRITON
from bench.machine.shares import fault
from bench.sass import SHARED_LIMIT, SPILLED, Resources

ROOT = Path(__file__).resolve().parents[2]
GOOD = Resources(
    registers=168, stack=0, spills=0, shared=100_000, wide_loads=1.0, wide_stores=1.0, tensor_cores={"HGMMA": 4}, dots=1
)
ARCHITECTURES = 80, 89, 90, 100  # of `aot_subset`
OTHERS = 75, 86, 120, "gfx942"
CONVOLUTIONS = ("conv_kernel", "conv_dgrad_kernel", "conv_wgrad_kernel")
KEEPING = ("conv_grads_kernel", "conv_resident_kernel")  # weights
PASSES = ("bn_add_relu_kernel", "bn_add_relu_backward_kernel")
SUMMING = {"bn_add_relu_backward_kernel", "bn_relu_max_pool_backward_kernel", "conv_dgrad_kernel", "finalize_kernel",
           "bn_backward_coef_kernel", "sum_parts_kernel", "global_avg_pool_kernel"}  # fmt: skip
TENSOR_CORES = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "tcgen05", 120: "HMMA", "gfx942": "MFMA"}


@pytest.fixture(scope="module")
def subset(tmp_path_factory):
    """What `aot_subset` printed: the interpreter's flag must be off before the kernels are imported."""
    folder = tmp_path_factory.mktemp("aot")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "FASTRES_CACHE": str(folder), "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("aot_subset.py")
    done = subprocess.run([sys.executable, script], env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_every_kernel_compiles_without_faults(subset):
    rows = subset["rows"]
    assert [(row["kernel"], row["arch"], row["faults"]) for row in rows if row["faults"]] == []
    assert {row["arch"] for row in rows} == set(ARCHITECTURES)
    assert {row["kernel"] for row in rows} >= {*CONVOLUTIONS, "finalize_kernel", "bn_add_relu_backward_kernel"}


def test_the_other_architectures_too(subset):
    """On Turing, where Triton has no tensor cores, without a spill at least: its convolutions are the library's."""
    rows = subset["others"]
    assert {row["arch"] for row in rows} == set(OTHERS)
    for row in rows:
        turings = row["arch"] == 75 and row["kernel"] in CONVOLUTIONS
        assert row["faults"] == (["tl.dot without a tensor core"] if turings else []), row
        assert row["spills"] == row["stack"] == 0 and row["shared"] <= SHARED_LIMIT[row["arch"]]
        if row["kernel"] in CONVOLUTIONS and not turings:
            assert TENSOR_CORES[row["arch"]] in row["tensor_cores"], row
            assert row["wide_loads"] > 0.5, row
            assert row["wide_stores"] > 0.5 or row["arch"] == "gfx942", row  # whose accumulators are of other shapes


def test_first_configurations_of_all_architectures_come_first(subset):
    """Turing has fp16 in the place of bf16, and no convolution of Triton's."""
    plan = [tuple(task) for task in subset["plan"]]
    places = {
        key: place for place, key in reversed([*enumerate((first, precision) for _, precision, first, _ in plan)])
    }
    assert sorted(places, key=places.get) == [(True, "bf16"), (True, "fp16"), (False, "bf16"), (False, "fp16")]
    assert {arch for arch, precision, first, _ in plan if precision == "bf16" and first} == {80, 86, 89, "gfx942"}
    assert not {kernel for arch, _, _, kernel in plan if arch == 75} & set(CONVOLUTIONS)
    assert "finalize_kernel" in {kernel for arch, _, _, kernel in plan if arch == 75}
    alike = [[task[1:] for task in plan if task[0] == arch] for arch in (86, 89)]
    assert alike[0] == alike[1]


def test_a_run_goes_on_where_the_last_one_ended(subset):
    """And says what it covers; the cache of `subset` is its own."""
    nothing, everything, again = subset["continued"]
    assert nothing["rows"] == [] and [one["compiled"] for one in nothing["coverage"]] == [0, 0]
    for one in (everything, again):
        assert len(one["rows"]) == sum(count["of"] for count in one["coverage"]) > 4
        assert [count["compiled"] for count in one["coverage"]] == [count["of"] for count in one["coverage"]]
        assert {row["kernel"] for row in one["rows"]} == {"finalize", "global_avg_pool", "global_avg_pool_backward"}
    assert everything["rows"] == again["rows"] and {one["code"] for one in subset["continued"]} == {0}
    assert everything["asked"] == {"networks": ["resnet8"], "precisions": ["bf16"], "ranks": [0]}


def test_what_is_disassembled_as_one_is_of_one_architecture():
    tasks = [(name, arch) for name in range(40) for arch in (80, 90)] + [(0, "gfx942")]
    batches = list(aot._batches(tasks))
    assert all(len({arch for _, arch in batch}) == 1 and len(batch) <= aot.BATCH for batch in batches)
    assert sorted(map(str, sum(batches, []))) == sorted(map(str, tasks))
    assert list(aot._batches([])) == [] and list(aot.compile_all([])) == []


def test_coverage_is_of_what_was_planned():
    tasks = [Task(name, arch, "bf16", Launch(name, (1,), rank=rank)) for name, rank in (("a", 0), ("b", 0), ("c", 3))
             for arch in (80, "gfx942")]  # fmt: skip
    rows = {
        ("a", 80): Row("a", 80, GOOD, share=0.5),
        ("b", 80): Row("b", 80, None, "error"),
        ("c", 80): Row("c", 80, GOOD),
    }
    counts = [[one[name] for name in ("arch", "configurations", "compiled", "of", "modelled")]
              for one in coverage(tasks, rows)]  # fmt: skip
    assert counts == [[80, "first", 2, 2, 1], ["gfx942", "first", 0, 2, 0], [80, "further", 1, 1, 0],
                      ["gfx942", "further", 0, 1, 0]]  # fmt: skip


def test_dilated_convolutions_compile_without_faults(subset):
    rows = subset["dilated"]
    assert [(row["kernel"], row["arch"], row["faults"]) for row in rows if row["faults"]] == []
    assert {(row["kernel"], row["arch"]) for row in rows} == {(k, arch) for k in CONVOLUTIONS for arch in ARCHITECTURES}
    for row in rows:
        assert row["stack"] <= SPILLED.get(row["arch"], 0) and TENSOR_CORES[row["arch"]] in row["tensor_cores"], row


def test_convolutions_use_each_architectures_tensor_cores(subset):
    rows = [row for row in subset["rows"] if row["kernel"] in CONVOLUTIONS]
    assert {(row["kernel"], row["arch"]) for row in rows} == {*itertools.product(CONVOLUTIONS, ARCHITECTURES)}
    assert any("shortcut_ptr" in row["tensors"] for row in rows)
    for row in rows:
        assert row["dots"] >= 1 and TENSOR_CORES[row["arch"]] in row["tensor_cores"], row


def test_activations_move_in_sixteen_bytes_a_thread(subset):
    """By bytes of instructions; the rest are coefficients and a tile's sums, a quarter of what the strided gradient
    behind constant statistics loads. (Pools also store taps, a byte each; of 3 channels no thread can load 16
    bytes.)"""
    rows = [row for row in subset["rows"] if row["kernel"] in (*CONVOLUTIONS, *PASSES)]
    rows = [row for row in rows if row["options"].get("maxnreg") != 168 and not row["constants"].get("FLAT")]
    assert {row["kernel"] for row in rows} >= {*CONVOLUTIONS, *PASSES}
    for row in rows:
        assert row["wide_loads"] >= 0.8 and row["wide_stores"] >= 0.6, row


def test_the_3x3_convolution_has_registers_to_spare(subset):
    """256 channels and statistics, sm_90: with at most 128 two programs of 8 warps run at once."""
    rows = [row for row in _convolutions(subset, 90) if row["constants"]["KH"] == 3 and "mean_ptr" in row["tensors"]]
    names = ("CIN", "COUT", "KH", "KW", "STRIDE")
    assert rows and all([row["constants"][name] for name in names] == [256, 256, 3, 3, 1] for row in rows)
    assert all(row["registers"] <= 128 and row["spills"] == 0 for row in rows)


def test_what_needs_more_than_128_registers_has_them(subset):
    """The 7x7 stem's weight gradient, which has a kernel of its own on sm_90, and the strided data gradient, behind a
    frozen BatchNorm."""
    needy = {"conv_wgrad_kernel": ("KH", 7, {80, 100}), "conv_dgrad_kernel": ("STRIDE", 2, {80, 90, 100})}
    for kernel, (name, value, archs) in needy.items():
        rows = [row for row in subset["rows"] if row["kernel"] == kernel and row["constants"][name] == value]
        rows = [row for row in rows if "y_ptr" not in row["tensors"]]
        assert {row["arch"] for row in rows} == archs
        assert all(row["spills"] == row["stack"] == 0 and row["options"]["maxnreg"] >= 168 for row in rows)


def test_a_gradient_that_stores_what_it_computes_beside_a_strided_residual_does_not_spill(subset):
    """With Triton 3.6 it did on sm_80, in steps of 64."""
    rows = [row for row in subset["rows"] if row["constants"].get("RESIDUAL_STRIDE") and "dy_ptr" in row["tensors"]]
    assert {row["arch"] for row in rows} >= {80, 90, 100}
    assert {row["constants"]["BLOCK_K"] for row in rows if row["arch"] == 80} == {32}
    assert all(row["spills"] == row["stack"] == 0 for row in rows)


def test_a_device_of_little_shared_memory_takes_tiles_that_fit(subset):
    """sm_86, sm_89 and sm_120 have the same limit."""
    rows = [row for row in subset["rows"] if row["arch"] == 89 and row["kernel"] in CONVOLUTIONS]
    assert {row["kernel"] for row in rows} == set(CONVOLUTIONS)
    for row in rows:
        assert row["shared"] <= SHARED_LIMIT[89] == SHARED_LIMIT[86] == SHARED_LIMIT[120]


def test_what_is_compiled_ahead_of_time_has_the_jits_key(subset):
    kernels = {kernel for kernel, _, _ in subset["keys"]}
    assert kernels >= {*CONVOLUTIONS, *PASSES, "named_kernel"} and len(subset["keys"]) > 50
    assert [kernel for kernel, ahead, just_in_time in subset["keys"] if ahead != just_in_time] == []
    assert len({key for _, key, _ in subset["keys"]}) == len(subset["keys"])


def test_the_jit_finds_in_its_cache_what_was_compiled_ahead_of_time(subset):
    assert subset["hits"] == [False, False, True, True, False]  # compiled twice, found twice, and one of its own


def test_no_kernel_is_slower_than_its_floor(subset):
    """Every convolution and pass has a floor and a share of what binds it; a fault would name one below."""
    rows = [row for row in subset["rows"] if row["share"] is not None and row["kernel"] in (*CONVOLUTIONS, *PASSES)]
    assert {(row["kernel"], row["arch"]) for row in rows} == {*itertools.product((*CONVOLUTIONS, *PASSES), (80, 90))}
    keeping = [row for row in subset["rows"] if row["kernel"] in KEEPING and row["arch"] == 90 and row["share"]]
    assert {row["kernel"] for row in keeping} == set(KEEPING)
    for row in rows + keeping:
        names = [name for name in ("KH", "STRIDE", "CIN", "COUT") if name in row["constants"]]
        names = names if row["kernel"] in (*CONVOLUTIONS, *KEEPING) else []
        floor = FLOORS[row["arch"]][(row["kernel"], *(row["constants"][name] for name in names))]
        assert 0 < row["share"] <= 1 and row["occupancy"] >= 1, row
        if triton.__version__.startswith(TRITON):
            assert floor <= row["share"], row
            assert row["share"] <= 2 * floor, f"raise the floor to 0.9 * {row['share']:.3f}"


def test_a_kernel_below_its_floor_is_not_shipped(monkeypatch):
    constants = {"KH": 3, "STRIDE": 1, "CIN": 64, "COUT": 32}
    one = SimpleNamespace(kernel="conv_kernel", constants=constants, pointers={"x_ptr": "bf16"})
    monkeypatch.setattr(floors, "TRITON", triton.__version__)
    monkeypatch.setitem(FLOORS, 90, {("conv_kernel", 3, 1, 64, 32): 0.3})
    assert fault(one, 90, 0.31) == fault(one, 90, None) == fault(one, 75, 0.1) == []
    assert fault(one, 90, 0.25) == ["25.0% of its bound by the model, 30.0% is the least"]
    in_fp32 = SimpleNamespace(kernel="conv_kernel", constants=constants, pointers={"x_ptr": "fp32"})
    assert fault(in_fp32, 90, 0.01) == []
    through_gelu = SimpleNamespace(
        kernel="conv_kernel", constants=constants | {"THROUGH": "gelu"}, pointers=one.pointers
    )
    assert fault(through_gelu, 90, 0.01) == []
    assert Row(one, 90, GOOD, share=0.25, first=True).faults == fault(one, 90, 0.25)
    assert Row(one, 90, GOOD, share=0.25).faults == []  # another rank's: a candidate, timed before it is taken


def test_sums_over_pixels_have_no_conflicts(subset):
    """Other than with a plain ``tl.sum``, which takes 2 to 8 times the cycles of the shared memory, or more rounds."""
    everywhere = SUMMING - {"conv_dgrad_kernel"}  # whose operands have some where they are read into registers
    rows = [row for row in subset["rows"] if row.get("conflicts")]
    of_hopper = [row for row in rows if row["arch"] == 90 and row["kernel"] in SUMMING]
    of_hopper = [row for row in of_hopper if row["constants"].get("BLOCK_N") != 32]
    assert {row["kernel"] for row in of_hopper} == SUMMING
    for row in of_hopper + [row for row in rows if row["kernel"] in everywhere]:
        assert row["conflicts"] <= 1.3, row


def test_the_model_takes_products_for_what_libraries_reach(subset):
    """Published: 600 to 800 TFLOP/s of large bf16 products on an H100, in large tiles."""
    assert 600 < subset["products"]["large"] < 800
    assert 200 < subset["products"]["small"] < 400


def _convolutions(subset, arch):
    return [row for row in subset["rows"] if (row["kernel"], row["arch"]) == ("conv_kernel", arch)]


def test_arguments_are_specialised_as_the_jit_does(subset):
    first, second = subset["probe"]
    assert first["grid"] == [16, 2] and first["options"] == {"num_warps": 2}
    assert first["signature"] == {
        "x_ptr": "*fp16", "maybe_ptr": "constexpr", "one": "constexpr", "sixteen": "i32", "seventeen": "i32",
        "BLOCK": "constexpr",
    }  # fmt: skip
    assert first["constants"] == {"maybe_ptr": None, "one": 1, "BLOCK": 32}
    assert first["divisible"] == [0, 3]
    assert second["constants"] == {"BLOCK": 32} and second["divisible"] == [1, 4]  # x[1:] is 2 bytes off


@pytest.mark.parametrize(
    "change, words",
    [
        ({}, None),
        ({"spills": 6, "stack": 16}, "spills (16 bytes of stack, 6 instructions)"),
        ({"shared": 200_000}, "200000 bytes of shared memory, 166912 there are"),
        ({"tensor_cores": {}}, "tl.dot without a tensor core"),
        ({"tensor_cores": {}, "dots": 0}, None),
        ({"conflicts": 2.0}, None),
        ({"conflicts": 8.3}, "8.3 times the cycles of the shared memory for conflicts between its banks"),
    ],
)
def test_what_must_not_be_shipped(change, words):
    assert GOOD._replace(**change).faults(80) == ([] if words is None else [words])
