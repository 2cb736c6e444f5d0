"""The fused step: what each of Triton's launches takes, and the quicker of it and the library where both are
candidates.

Training times the candidates of every convolution when it first meets its shape (`fastres.ops.timing`): Triton's
configurations, and cuDNN with the passes that it needs around it. Both choices are predicted here with the model's
times.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from bench.launches import Launch, Specialisation
from bench.machine.chips import LAUNCH, SMALL, Chip
from bench.machine.peers import ENDS, Convolution
from bench.machine.predict import Prediction, launch_seconds
from bench.machine.program import Program, compiled
from bench.machine.work import MERGING, STREAMING, Work, work_of


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
            return "merging" if f"{name}_kernel" in MERGING else name
        stride = f"/{constants['STRIDE']}" if constants["STRIDE"] > 1 else ""
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
    if launch.specialisation.kernel in MERGING:
        return Prediction(SMALL + LAUNCH, SMALL * chip.clock, 1, {}, 0.0)
    if launch.specialisation.kernel in STREAMING:
        seconds = work.bytes / chip.bandwidth + LAUNCH
        return Prediction(seconds, seconds * chip.clock, 1, {"memory": 1.0}, 1.0)
    return launch_seconds(program, work, chip)


def is_convolution(one: Timed) -> bool:
    """Whether the launch is a convolution's product."""
    return "KH" in one.launch.specialisation.constants


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


def with_library(step: list[Timed], end: str, arch: int, chip: Chip) -> tuple[float, dict[str, int]]:
    """Seconds of the step where each convolution takes the quicker of Triton and the library; how many took which.

    Args:
        end: key of `bench.machine.peers.ENDS`, for the library's products.
    """
    total = sum(one.seconds for one in step if not is_convolution(one))
    chosen = {"Triton": 0, "library": 0}
    for triton, library in _candidates(step, end, arch, chip):
        total += min(triton, library)
        chosen["library" if library < triton else "Triton"] += 1
    return total, chosen


def _candidates(step: list[Timed], end: str, arch: int, chip: Chip) -> Iterator[tuple[float, float]]:
    """Of each forward convolution, and of each pair of gradients, Triton's time and the library's."""
    found = [one for one in step if is_convolution(one)]
    index = 0
    while index < len(found):
        one, kernel = found[index], found[index].launch.specialisation.kernel
        index += 1
        if kernel == "conv_kernel":
            yield one.seconds, _library(one, "forward", end, arch, chip) + _passes(_around_forward(one), chip)
            continue
        pair = [one]
        if kernel == "conv_dgrad_kernel" and index < len(found) and _is(found[index], "conv_wgrad_kernel"):
            pair.append(found[index])
            index += 1
        triton = sum(each.seconds for each in pair)
        wgrad = next((each for each in pair if _is(each, "conv_wgrad_kernel")), None)
        if wgrad is None:
            yield triton, triton
            continue
        before = _passes(_before_gradients(wgrad), chip)
        library = before + _library(wgrad, "wgrad", end, arch, chip)
        if len(pair) == 1:
            yield triton, library
            continue
        applied = [] if _size(wgrad, "abc_ptr") else _applied(one)  # dgrad keeps dy for wgrad
        both = library + _library(one, "dgrad", end, arch, chip) + _passes(applied + _behind_dgrad(one), chip)
        yield triton, min(one.seconds + library, both)


def _is(one: Timed, kernel: str) -> bool:
    return one.launch.specialisation.kernel == kernel


def _library(one: Timed, direction: str, end: str, arch: int, chip: Chip) -> float:
    return convolution_of(one.launch).seconds(direction, ENDS[end], arch, chip)


def convolution_of(launch: Launch) -> Convolution:
    """The convolution whose product or gradient a launch is."""
    constants, integers = launch.specialisation.constants, launch.integers
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
    """BatchNorm's backward, and the normalised input again."""
    return _applied(wgrad) + ([2 * _size(wgrad, "x_ptr")] if _size(wgrad, "coef_ptr") else [])


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
