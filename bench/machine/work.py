"""What a recorded launch has to do: trips of its loop, bytes of its tensors, operations of its product."""

from __future__ import annotations

import math
from typing import NamedTuple

from bench.launches import Launch, Specialisation
from bench.machine.loops import body, issued_bytes, main_loop
from bench.machine.pipes import WARPGROUP, moved, operations
from bench.machine.program import Program
from bench.workloads import IMAGE

# Kernels that merge a few rows of sums.
MERGING = {"finalize_kernel", "merge_kernel", "bn_backward_coef_kernel", "partial_sums_kernel", "running_coef_kernel"}
# Sums of parts of weight gradients.
PARTS = "sum_parts_kernel"
# Elementwise passes: at the memory's rate, as the peers' are.
STREAMING = {"bn_add_relu_kernel", "bn_add_relu_backward_kernel", "bn_backward_apply_kernel", "moments_kernel",
             "spread_kernel", "gather_kernel"}  # fmt: skip
# Those whose windows overlap, by plain loads, which go through the L1.
WINDOWS = {"bn_relu_max_pool_kernel", "bn_relu_max_pool_backward_kernel"}
# Of the first layer.
STEM, STEM_WGRAD = "conv_stem_kernel", "conv_stem_wgrad_kernel"
# Those that go through a number of steps.
STEPPING = {STEM, STEM_WGRAD, "conv_wgrad_kernel", "conv_grads_kernel", "conv_resident_kernel"}
# Both gradients of a pointwise convolution: two products a trip.
BOTH = "conv_grads_kernel"


class Work(NamedTuple):
    """Of one launch."""

    programs: int
    trips: int  # of the machine code's main loop
    bytes: int  # each tensor once; of a pointwise convolution with a stride the pixels that it reads
    operations: int  # of a convolution
    again: float = 0.0  # share of what its programs load that they have loaded before


def work_of(launch: Launch, program: Program) -> Work:
    """What a launch of one of the project's kernels does."""
    trips = math.ceil(trips_of(launch) / unrolled(program, launch.specialisation))
    again = _again(launch, program, trips) if launch.specialisation.kernel in WINDOWS else 0.0
    return Work(launch.programs, trips, _bytes(launch), _operations(launch), again)


def trips_of(launch: Launch) -> int:
    """Steps of the kernel's loop, as its source has it."""
    integers, constants = launch.integers, launch.specialisation.constants
    if launch.specialisation.kernel in STEPPING:
        return integers["steps"]
    if launch.specialisation.kernel == PARTS:
        return math.ceil(integers["parts"] / constants["PARTS"])
    match launch.specialisation.kernel:
        case "conv_kernel":
            return integers["k_blocks"]
        case "conv_dgrad_kernel":  # a program's taps are those of its pixels' remainder modulo the stride: the mean
            taps = constants["KH"] * constants["KW"] / constants["STRIDE"] ** 2
            return max(1, round(integers["c_blocks"] * taps))
    return integers.get("tiles", 1)


def _bytes(launch: Launch) -> int:
    constants = launch.specialisation.constants
    skipping = launch.specialisation.kernel != "conv_dgrad_kernel" and constants.get("KH") == 1
    sizes: dict[int, int] = {}
    for name, (address, size) in launch.tensors.items():
        part = constants["STRIDE"] ** 2 if skipping and name == "x_ptr" else 1
        sizes[address] = max(size // part, sizes.get(address, 0))
    # A pass that leaves its result where its operand was moves that memory twice.
    in_place = [launch.tensors.get(name) for name in ("dout_ptr", "dz_ptr")]
    again = in_place[0][1] if in_place[0] is not None and in_place[0] == in_place[1] else 0
    return sum(sizes.values()) + again


def _again(launch: Launch, program: Program, trips: int) -> float:
    loaded, stored = (
        launch.programs * program.warps * issued_bytes(program.code, trips, {name}) for name in ("LDG", "STG")
    )
    return max(0.0, 1 - max(0, _bytes(launch) - stored) / loaded)


def _operations(launch: Launch) -> int:
    constants, integers = launch.specialisation.constants, launch.integers
    if "COUT" not in constants:
        return 0
    pixels = integers["M"] if "M" in integers else integers["N"] * integers["OH"] * integers["OW"]  # of dz
    products = 2 if launch.specialisation.kernel == BOTH else 1
    taps = constants.get("KH", 1) * constants.get("KW", 1)
    return 2 * products * pixels * constants.get("CIN", IMAGE) * constants["COUT"] * taps


def unrolled(program: Program, one: Specialisation) -> int:
    """Trips of the source's loop that one of the machine code's makes.

    By the groups of asynchronous copies, of which as many trips as there are stages but one are in front of the loop;
    without copies by the operations of both, which tells trips from warps that do the same (of tiles with fewer
    fragments than warps) no more.
    """
    loop, constants = main_loop(program.code), one.constants
    if loop is None:
        return 1
    inside, warps = body(program.code, loop), program.warps
    groups, ahead = (sum(each.name == "LDGDEPBAR" for each in part) for part in (inside, program.code[: loop.first]))
    if groups and ahead:
        return max(1, round(groups * (dict(one.options)["num_stages"] - 1) / ahead))
    tile = [int(constants.get(f"BLOCK_{side}") or 0) for side in "MNK"]
    if all(tile):
        products = 2 if one.kernel == BOTH else constants.get("TAPS", 1)
        per_warp = {"HGMMA": warps / WARPGROUP, "HMMA": warps}
        done = sum(operations(each) * per_warp.get(each.name, 0) for each in inside)
        return max(1, round(done / (2 * products * math.prod(tile))))
    if one.kernel == PARTS:
        loaded = sum(moved(each) for each in inside if each.name == "LDG") * warps
        return max(1, round(loaded / (4 * constants["PARTS"] * constants["BLOCK"])))
    return 1
