"""What a launch has to do, read from what it was given and from its machine code."""

import pytest

from bench.launches import Launch, Specialisation
from bench.machine.assembly import NO_SCOREBOARD, Instruction
from bench.machine.loops import issued_bytes
from bench.machine.program import Program
from bench.machine.work import work_of

LOAD, STORE = Instruction("LDG.E.128"), Instruction("STG.E.128")
WARPS, PROGRAMS = 8, 100


def looped(*body: Instruction) -> tuple[Instruction, ...]:
    return (Instruction("NOP"), *body, Instruction("BRA", "`(.L_x_0)", "@P0", target=1), Instruction("EXIT"))


def launch(kernel: str, integers=None, constants=None, **bytes_of: int) -> Launch:
    values = constants or {}
    signature = tuple((name, "constexpr") for name in values)
    one = Specialisation("", kernel, signature, tuple(((at,), each) for at, each in enumerate(values.values())), (), ())
    tensors = {f"{name}_ptr": (address, size) for address, (name, size) in enumerate(bytes_of.items())}
    return Launch(one, (PROGRAMS,), integers or {}, tensors=tensors)


def program(*body: Instruction) -> Program:
    return Program(looped(*body), 64, 0, WARPS)


def test_issued_bytes_are_those_of_the_loop_as_often_as_it_turns():
    code = looped(LOAD, LOAD, STORE)
    assert issued_bytes(code, 5) == 5 * 3 * 512
    assert issued_bytes(code, 5, {"LDG"}) == 5 * 2 * 512
    assert issued_bytes((LOAD, *code), 5, {"LDG"}) == 512 + 5 * 2 * 512


def test_windows_load_again_what_they_share():
    """Nine loads of a tap for a result of the same bytes, from a tensor of four times those: 5/9 are repetitions."""
    result = PROGRAMS * WARPS * 512
    pool, other = (
        launch(kernel, y=4 * result, out=result) for kernel in ("bn_relu_max_pool_kernel", "bn_add_relu_kernel")
    )
    taps = program(*[LOAD] * 9, STORE)
    assert work_of(pool, taps).again == pytest.approx(5 / 9)
    assert work_of(other, taps).again == 0
    assert work_of(pool, program(*[LOAD] * 4, STORE)).again == 0
    assert work_of(pool, program(LOAD, STORE)).again == 0  # less than the tensor


def test_a_sum_of_parts_turns_once_for_each_tile_of_them():
    constants = {"PARTS": 16, "BLOCK": 128}
    one = launch("sum_parts_kernel", {"parts": 40}, constants, parts=10**6, out=10**4)
    load = Instruction("LDG.E.128", write=NO_SCOREBOARD)
    assert work_of(one, Program(looped(*[load] * 4), 40, 0, 4)).trips == 3  # a tile is 4 loads of 4 warps
    assert work_of(one, Program(looped(*[load] * 8), 40, 0, 4)).trips == 2  # the compiler made two tiles of each turn
