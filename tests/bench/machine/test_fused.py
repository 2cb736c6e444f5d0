"""A step by its fused kernels: small launches, and the choice among ways and the library."""

import pytest

from bench.launches import Launch, Specialisation
from bench.machine import fused
from bench.machine.chips import CHIPS, LAUNCH, PARTS_SHARE, ROWS_SHARE, SMALL, SUM, SUM_STEP
from bench.machine.fused import Timed, gradients, longer, merging_seconds, summing_seconds, with_library
from bench.machine.predict import Prediction
from bench.machine.work import Work

H100 = CHIPS[90]


def launch(kernel, tensors=None, programs=1, **constants):
    """With tensors by name: address and bytes."""
    named = tuple((name, "constexpr") for name in constants)
    values = tuple(((place,), value) for place, value in enumerate(constants.values()))
    return Launch(Specialisation("", kernel, named, values, (), ()), (programs,), tensors=tensors or {})


def timed(kernel, seconds, **tensors):
    constants = {"KH": 3, "KW": 3, "STRIDE": 1} if kernel.startswith("conv") else {}
    one = launch(kernel, {name: (address, 10) for name, address in tensors.items()}, **constants)
    return Timed(one, Work(1, 1, 1, 1), Prediction(seconds, 1, 1, {}, 1.0))


FORWARD = timed("conv_kernel", 1.0)
BEGIN = [FORWARD, timed("bn_backward_apply_kernel", 0.5, dy_ptr=7)]
END = [timed("bn_backward_coef_kernel", 0.1), timed("conv_wgrad_kernel", 2.0)]
FIRST = [*BEGIN, timed("conv_dgrad_kernel", 5.0, dz_ptr=3), timed("conv_wgrad_kernel", 4.0), *END]
PASS = [*BEGIN, timed("bn_backward_apply_kernel", 1.5, dy_ptr=3), timed("conv_dgrad_kernel", 2.0, dz_ptr=3),
        timed("conv_wgrad_kernel", 3.0), *END]  # fmt: skip


def seconds(groups):
    return [[one.seconds for one in group] for group in groups]


def test_gradients_of_a_convolution_and_the_pass_that_is_theirs():
    """A pass that made something else is not, and one weight gradient alone is a group."""
    assert seconds(gradients(FIRST)) == [[1.0], [5.0, 4.0], [2.0]]
    assert seconds(gradients(PASS)) == [[1.0], [1.5, 2.0, 3.0], [2.0]]


@pytest.mark.parametrize(
    "library, ways, total, chosen",
    [
        ((9, 9, 9), [], 12.6, {"Triton": 3, "another way": 0, "library": 0}),
        ((9, 9, 9), [PASS], 10.1, {"Triton": 2, "another way": 1, "library": 0}),
        ((9, 6, 9), [PASS], 9.6, {"Triton": 2, "another way": 0, "library": 1}),
        ((0.5, 9, 9), [PASS, FIRST], 9.6, {"Triton": 1, "another way": 1, "library": 1}),
    ],
)
def test_each_convolution_takes_its_quickest_candidate(monkeypatch, library, ways, total, chosen):
    waiting = iter(library)
    monkeypatch.setattr(fused, "_candidates", lambda group, *_: (sum(one.seconds for one in group), next(waiting)))
    found = with_library(FIRST, "tuned", 90, H100, ways)
    assert found == (pytest.approx(total), chosen)


def test_small_launches_take_their_rows_at_the_rate_of_the_programs_that_read_them():
    """Another layer's weight gradient is added up beside them, at a rate of its own."""
    rate, whole = ROWS_SHARE * H100.l2 * H100.clock, PARTS_SHARE * 132 * H100.l2 * H100.clock
    rows = {"sums_ptr": (0, 10**6), "coef_ptr": (1, 10**3)}
    alone = launch("bn_backward_coef_kernel", rows, programs=4, C=64, BLOCK_C=16)
    assert merging_seconds(alone, H100) == pytest.approx(SMALL + 1.001e6 / (4 * rate))
    many = launch("merge_kernel", rows, programs=1000)
    assert merging_seconds(many, H100) == pytest.approx(SMALL + 1.001e6 / min(132 * rate, whole))
    for size in (10**5, 10**9):
        joined = launch("bn_backward_coef_kernel", {**rows, "parts_ptr": (2, size)}, programs=700, C=64, BLOCK_C=16)
        expected = SMALL + max(1.001e6 / (4 * rate), (1.001e6 + size) / whole)
        assert merging_seconds(joined, H100) == pytest.approx(expected)


def test_a_sum_of_parts_takes_its_steps_or_its_bytes():
    rate = PARTS_SHARE * 132 * H100.l2 * H100.clock
    for parts, size, expected in ((40, 10**3, 3 * SUM_STEP), (8, 10**8, 1.01e8 / rate)):
        one = launch("sum_parts_kernel", {"parts_ptr": (0, size), "out_ptr": (1, size // 100)}, PARTS=16)
        one.integers["parts"] = parts
        assert summing_seconds(one, H100) == pytest.approx(SUM + expected)


def test_a_kernel_that_takes_longer_keeps_its_gap_and_its_work():
    one = longer(Prediction(10e-6 + LAUNCH, 1000, 2, {"memory": 0.9}, 0.6), 1.25)
    assert one.seconds == pytest.approx(12.5e-6 + LAUNCH) and one.cycles == 1250 and one.resident == 2
    assert one.busy == {"memory": pytest.approx(0.72)}
    assert one.share * one.seconds == pytest.approx(0.6 * (10e-6 + LAUNCH))
