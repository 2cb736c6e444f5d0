"""The fused step: what each of Triton's launches takes, and the quicker of it and the library where both are
candidates.

Training times the candidates of every convolution when it first meets its shape (`fastres.ops.timing`): Triton's
configurations, and cuDNN with the passes that it needs around it. Both choices are predicted here with the model's
times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from bench.launches import Launch, Specialisation
from bench.machine.chips import LAUNCH, LONGER, PARTS_SHARE, ROWS_SHARE, SMALL, SUM, SUM_STEP, Chip
from bench.machine.peers import ENDS, Convolution
from bench.machine.predict import Prediction, launch_seconds
from bench.machine.program import Program, compiled
from bench.machine.work import BOTH, MERGING, PARTS, STEM, STEM_WGRAD, STREAMING, Work, trips_of, work_of
from bench.workloads import IMAGE


class Timed(NamedTuple):
    """A launch, what it has to do and its predicted time."""

    launch: Launch
    work: Work
    prediction: Prediction

    @property
    def seconds(self) -> float:
        """Predicted time with the gap to the next launch."""
        return self.prediction.seconds

    @property
    def kind(self) -> str:
        """Kernel, window and stride."""
        constants = self.launch.specialisation.constants
        name = self.launch.specialisation.kernel.removesuffix("_kernel")
        if "KH" not in constants:
            return "merging" if f"{name}_kernel" in MERGING else f"{name} 1x1" if name.startswith("conv") else name
        stride = f"/{constants.get('STRIDE', 2)}" if constants.get("STRIDE", 2) > 1 else ""
        return f"{name} {constants['KH']}x{constants['KW']}{stride}"


class Compiler:
    """Programs of an architecture, each compiled once."""

    def __init__(self, arch: int):
        self.arch = arch
        self._programs: dict[Specialisation, Program] = {}

    def __call__(self, one: Specialisation) -> Program:
        """The specialisation's program."""
        if one not in self._programs:
            self._programs[one] = compiled(one, self.arch)
        return self._programs[one]


def timed(step: list[Launch], programs: Compiler, chip: Chip) -> list[Timed]:
    """Predict every launch; like ones once.

    Raises:
        ValueError: for a kernel that is not modelled on this architecture.
    """
    known: dict[tuple, Timed] = {}
    found = []
    for launch in step:
        program = programs(launch.specialisation)
        work = work_of(launch, program)
        key = (launch.specialisation, work)
        if key not in known:
            known[key] = Timed(launch, work, _prediction(launch, program, work, chip))
        found.append(known[key]._replace(launch=launch))
    return found


def _prediction(launch: Launch, program: Program, work: Work, chip: Chip) -> Prediction:
    kernel = launch.specialisation.kernel
    if kernel in MERGING or kernel == PARTS:
        seconds = merging_seconds(launch, chip) if kernel in MERGING else summing_seconds(launch, chip)
        return Prediction(seconds + LAUNCH, seconds * chip.clock, 1, {}, 0.0)
    if kernel in STREAMING:
        seconds = work.bytes / chip.bandwidth + LAUNCH
        return Prediction(seconds, seconds * chip.clock, 1, {"memory": 1.0}, 1.0)
    return longer(launch_seconds(program, work, chip), LONGER.get(kernel, 1.0))


def longer(one: Prediction, times: float) -> Prediction:
    """A prediction whose kernel, without the gap to the next one, takes so many times as long."""
    seconds = (one.seconds - LAUNCH) * times + LAUNCH
    busy = {name: share / times for name, share in one.busy.items()}
    return one._replace(seconds=seconds, cycles=one.cycles * times, busy=busy, share=one.share * one.seconds / seconds)


def merging_seconds(launch: Launch, chip: Chip) -> float:
    """Dependent trips, and the rows of partial results at the rate of the L2 that the programs which read them have;
    what another layer's weight gradient has in the launch is read by other programs at the same time. All come from the
    L2, where the launches before left them."""
    sizes = {name: size for name, (_, size) in launch.tensors.items()}
    others = sum(sizes.pop(name, 0) for name in ("parts_ptr", "dw_ptr"))
    constants = launch.specialisation.constants
    programs = launch.programs
    if "parts_ptr" in launch.tensors:
        programs = math.ceil(constants["C"] / constants["BLOCK_C"])
    rate = min(programs, chip.sms) * ROWS_SHARE * chip.l2 * chip.clock
    return SMALL + max(sum(sizes.values()) / rate, (sum(sizes.values()) + others) / _parts_rate(chip))


def summing_seconds(launch: Launch, chip: Chip) -> float:
    """A sum of parts: dependent steps, or the parts at the L2's rate."""
    sizes = sum(size for _, size in launch.tensors.values())
    return SUM + max(trips_of(launch) * SUM_STEP, sizes / _parts_rate(chip))


def _parts_rate(chip: Chip) -> float:
    return PARTS_SHARE * chip.l2 * chip.sms * chip.clock


def is_convolution(one: Timed) -> bool:
    """Whether the launch is a convolution's product, or two."""
    return one.launch.specialisation.kernel.startswith("conv")


def quickest(ranks: list[list[Timed]]) -> list[Timed]:
    """The first rank's launches, each convolution at its quickest configuration.

    Raises:
        ValueError: where the ranks have other convolutions than the first.
    """
    of_rank = [[one for one in rank if is_convolution(one)] for rank in ranks]
    if len({tuple(one.kind for one in rank) for rank in of_rank}) != 1:
        raise ValueError("the ranks launch different convolutions")
    best = iter([min(same, key=lambda one: one.seconds) for same in zip(*of_rank)])
    return [next(best) if is_convolution(one) else one for one in ranks[0]]


def with_library(
    step: list[Timed], end: str, arch: int, chip: Chip, ways: Sequence[list[Timed]] = ()
) -> tuple[float, dict[str, int]]:
    """Seconds of the step where each convolution takes the quickest candidate; how many took which.

    Args:
        end: key of `bench.machine.peers.ENDS`, for the library's products.
        ways: the same step by the other ways in which gradients share what they read.
    """
    total = sum(one.seconds for one in step if not is_convolution(one))
    chosen = {"Triton": 0, "another way": 0, "library": 0}
    others = [gradients(way) for way in ways]
    for place, group in enumerate(gradients(step)):
        triton, library = _candidates([one for one in group if is_convolution(one)], end, arch, chip)
        # The passes of the first way are in the total already.
        another = min((triton + _seconds(other[place]) - _seconds(group) for other in others), default=triton)
        best = min(triton, another, library)
        total += best
        chosen["Triton" if best == triton else "another way" if best == another else "library"] += 1
    return total, chosen


def gradients(step: list[Timed]) -> list[list[Timed]]:
    """Each forward convolution, and each one's gradients, with the pass right before them that made dy."""
    found: list[list[Timed]] = []
    for place, one in enumerate(step):
        if not is_convolution(one):
            continue
        if _is(one, "conv_wgrad_kernel") and found and _is(found[-1][-1], "conv_dgrad_kernel"):
            found[-1].append(one)
            continue
        before = step[place - 1 : place] if _is(one, "conv_dgrad_kernel") else []
        dy = one.launch.tensors.get("dz_ptr")
        found.append([*(each for each in before if each.launch.tensors.get("dy_ptr") == dy), one])
    return found


def _seconds(group: list[Timed]) -> float:
    return sum(one.seconds for one in group)


def _candidates(group: list[Timed], end: str, arch: int, chip: Chip) -> tuple[float, float]:
    """Of a forward convolution, or of a pair of gradients, Triton's time and the library's."""
    one, triton = group[0], _seconds(group)
    if any(_is(one, kernel) for kernel in ("conv_kernel", "conv_resident_kernel", STEM)):
        return triton, _library(one, "forward", end, arch, chip) + _passes(_around_forward(one), chip)
    if _is(one, BOTH):
        library = _passes(_before_gradients(one) + _behind_dgrad(one), chip)
        return triton, library + sum(_library(one, each, end, arch, chip) for each in ("wgrad", "dgrad"))
    wgrad = next((each for each in group if _is(each, "conv_wgrad_kernel") or _is(each, STEM_WGRAD)), None)
    if wgrad is None:
        return triton, triton
    library = _passes(_before_gradients(wgrad), chip) + _library(wgrad, "wgrad", end, arch, chip)
    if len(group) == 1:
        return triton, library
    applied = [] if _size(wgrad, "abc_ptr") else _applied(one)  # dgrad keeps dy for wgrad
    both = library + _library(one, "dgrad", end, arch, chip) + _passes(applied + _behind_dgrad(one), chip)
    return triton, min(one.seconds + library, both)


def _is(one: Timed, kernel: str) -> bool:
    return one.launch.specialisation.kernel == kernel


def _library(one: Timed, direction: str, end: str, arch: int, chip: Chip) -> float:
    return convolution_of(one.launch).seconds(direction, ENDS[end], arch, chip)


def convolution_of(launch: Launch) -> Convolution:
    """The convolution whose product or gradient a launch is."""
    constants, integers = launch.specialisation.constants, launch.integers
    if "KH" not in constants:  # of a kernel for pointwise ones
        return Convolution(integers["M"], integers["M"], constants["CIN"], constants["COUT"], 1, 1)
    if launch.specialisation.kernel in (STEM, STEM_WGRAD):
        taps = constants["KH"] * constants["KW"]
        return Convolution(4 * integers["M"], integers["M"], IMAGE, constants["COUT"], taps, 2)
    outputs = integers["M"] if "M" in integers else integers["N"] * integers["OH"] * integers["OW"]
    images = outputs // (integers["OH"] * integers["OW"])
    inputs = images * integers["H"] * integers["W"]
    taps = constants["KH"] * constants["KW"]
    return Convolution(inputs, outputs, constants["CIN"], constants["COUT"], taps, constants["STRIDE"])


def _passes(bytes_of: list[int], chip: Chip) -> float:
    return sum(count / chip.bandwidth + LAUNCH for count in bytes_of)


def _size(one: Timed, *names: str) -> int:
    return sum(one.launch.tensors[name][1] for name in names if name in one.launch.tensors)


def _around_forward(one: Timed) -> list[int]:
    """Bytes of the passes: the prologue as one of its own, and the statistics."""
    prologue = [2 * _size(one, "x_ptr") + _size(one, "shortcut_ptr")] if _size(one, "coef_ptr") else []
    return prologue + ([_size(one, "y_ptr")] if _size(one, "mean_ptr") else [])


def _before_gradients(wgrad: Timed) -> list[int]:
    """BatchNorm's backward, and the normalised input again, where the end of a block is not there."""
    made = _size(wgrad, "coef_ptr") and not _size(wgrad, "mask_ptr")
    return _applied(wgrad) + ([2 * _size(wgrad, "x_ptr")] if made else [])


def _applied(one: Timed) -> list[int]:
    """BatchNorm's backward, where the kernel has it in its prologue."""
    return [2 * _size(one, "dz_ptr") + _size(one, "y_ptr")] if _size(one, "abc_ptr") else []


def _behind_dgrad(dgrad: Timed) -> list[int]:
    """The residual's addition, the ReLU's backward and the sums."""
    dx = _size(dgrad, "dx_ptr")
    found = [2 * dx + _size(dgrad, "residual_ptr")] if _size(dgrad, "residual_ptr") else []
    return found + ([3 * dx, 2 * dx] if _size(dgrad, "sums_ptr") else [])


def by_kind(step: list[Timed], chip: Chip) -> list[dict[str, Any]]:
    """The step's launches by kernel, window and stride, the longest together first."""
    kinds: dict[str, list[Timed]] = {}
    for one in step:
        kinds.setdefault(one.kind, []).append(one)
    found = [
        {
            "kind": kind,
            "launches": len(same),
            "seconds": sum(one.seconds for one in same),
            "bytes": sum(one.work.bytes for one in same) / chip.bandwidth,
            "tensor": sum(one.work.operations for one in same) / chip.peak,
            "least": sum(max(one.work.bytes / chip.bandwidth, one.work.operations / chip.peak) for one in same),
        }
        for kind, same in kinds.items()
    ]
    return sorted(found, key=lambda one: -one["seconds"])
