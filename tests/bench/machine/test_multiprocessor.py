"""The model of a multiprocessor on code written by hand, whose time is known: one bound at a time."""

import pytest

from bench.machine.assembly import NO_SCOREBOARD, Instruction
from bench.machine.chips import CHIPS
from bench.machine.loops import jumps, main_loop
from bench.machine.multiprocessor import BRANCH, GLOBAL_ISSUE, UNIFORM, Multiprocessor

H100 = CHIPS[90]
EXIT = Instruction("EXIT")


def looped(*body: Instruction) -> list[Instruction]:
    """The instructions in a loop."""
    return [Instruction("NOP"), *body, Instruction("BRA", "`(.L_x_0)", "@P0", target=1), EXIT]


def trip(code, warps=8, resident=1, far=0.0, chip=H100, again=0.0) -> float:
    """Cycles of one trip of all the programs that are resident."""
    ends = [
        Multiprocessor(code, warps, resident, resident, trips, far, chip.memory, chip, again).run().ends[-1]
        for trips in (20, 60)
    ]
    return (ends[1] - ends[0]) / 40


def close(value: float, expected: float) -> bool:
    return value == pytest.approx(expected, rel=0.03)


def test_a_quarter_issues_an_instruction_a_clock():
    """8 warps are two a quarter: each of 50 instructions that no pipe is short for takes two cycles."""
    code = looped(*[Instruction("NOP")] * 50)
    assert close(trip(code, warps=8), 2 * 51)
    assert close(trip(code, warps=16), 4 * 51)


def test_one_warp_a_quarter_waits_out_its_stall_counts():
    code = looped(*[Instruction("NOP", stall=4)] * 50)
    assert close(trip(code, warps=4), 50 * 4 + 1 + BRANCH)
    assert close(trip(code, warps=8), 50 * 4 + 1 + BRANCH)  # the second warp issues in between
    assert close(trip(code, warps=32), 8 * 51)  # eight warps do issue every clock


def test_integers_have_half_the_rate_and_multiplications_of_floats_the_whole():
    assert close(trip(looped(*[Instruction("IADD3")] * 50), warps=8), 2 * 2 * 50)
    assert close(trip(looped(*[Instruction("FFMA")] * 50), warps=8), 2 * 51)
    assert close(trip(looped(*[Instruction("FFMA")] * 50), warps=8, chip=CHIPS[80]), 2 * 2 * 50)  # one pipe there
    assert close(trip(looped(*[Instruction("MUFU.RCP")] * 50), warps=8), 2 * 8 * 50)
    mixed = [Instruction("IADD3"), Instruction("FFMA")] * 25
    assert close(trip(looped(*mixed), warps=8), 2 * 51)  # pipes work side by side


def test_an_instruction_that_is_never_executed_costs_its_slot():
    assert close(trip(looped(*[Instruction("LDS.128", guard="@!PT")] * 50), warps=8), 2 * 2 * 50)  # not its bytes


def test_a_dependent_load_costs_its_latency():
    """From the L2, one warp, nothing to do meanwhile; two programs hide half of it each."""
    load = Instruction("LDG.E", write=0)
    use = Instruction("NOP", wait=1)
    latency = GLOBAL_ISSUE + H100.l2_latency + 128 / H100.l2
    assert close(trip(looped(load, use), warps=1), latency + 2 + BRANCH)
    assert close(trip(looped(load, use), warps=1, resident=2), latency + 2 + BRANCH)
    assert close(trip(looped(load, use), warps=1, far=1.0), latency + 2 + BRANCH + H100.memory_latency - H100.l2_latency
                 + 128 / H100.memory - 128 / H100.l2)  # fmt: skip


def test_asynchronous_copies_hide_it():
    """With three groups in flight the L2's rate is what is left, with none its latency comes on top."""
    body = [Instruction("LDGSTS.E.128")] * 4 + [Instruction("LDGDEPBAR"), Instruction("DEPBAR.LE", "SB0, 0x3")]
    assert close(trip(looped(*body), warps=8), 8 * 4 * 512 / H100.l2)
    waiting = [*body[:-1], Instruction("DEPBAR.LE", "SB0, 0x0")]
    assert trip(looped(*waiting), warps=1) > 4 * 512 / H100.l2 + H100.l2_latency


def test_bytes_of_the_memory_bound_a_copy():
    body = [Instruction("LDG.E.128", write=0), Instruction("STG.E.128", wait=1)]
    assert close(trip(looped(*body * 4), warps=8, resident=4, far=1.0), 4 * 8 * 8 * 512 / H100.memory)


def test_the_l1_serves_its_share_of_the_loads():
    """The rest is left to the L2; what the L1 serves goes through the shared memory's port, and is there sooner."""
    load, use = Instruction("LDG.E.128", write=0), Instruction("NOP", wait=1)
    together = looped(*[load] * 16, use)
    assert close(trip(together, warps=32, again=0.5), 8 * 32 * 512 / H100.l2)
    assert close(trip(together, warps=32, again=0.75), 12 * 32 * 512 / H100.shared_bytes)
    far, near = (GLOBAL_ISSUE + latency for latency in (H100.l2_latency + 512 / H100.l2, H100.shared_latency + 4))
    assert close(trip(looped(*[load, use] * 4), warps=1, again=0.75), far + 3 * near + 4 * 2 + BRANCH)


def test_the_port_of_the_shared_memory_passes_128_bytes_a_clock():
    use = Instruction("NOP", wait=1)
    assert close(trip(looped(*[Instruction("LDS.128", write=0)] * 16, use), warps=16), 16 * 16 * 512 / 128)
    assert close(trip(looped(*[Instruction("SHFL.BFLY", write=0)] * 16, use), warps=16), 16 * 16 * 128 / 128)


def test_conflicts_between_banks_keep_the_port():
    use, thread = Instruction("NOP", wait=1), Instruction("S2R", "R0, SR_TID.X")
    for stride, passes in ((4, 1), (64, 16), (128, 32)):
        address = Instruction("IMAD", f"R1, R0, {stride:#x}, RZ")
        loads = [Instruction("LDS", "R2, [R1]", write=0)] * 16
        taken = trip(looped(thread, address, *loads, use), warps=16)
        assert close(taken, 16 * 16 * passes), stride


def test_warps_meet_at_a_barrier():
    code = looped(Instruction("BAR.SYNC.DEFER_BLOCKING", "0x0"))
    assert trip(code, warps=8) == pytest.approx(H100.barrier + 1 + BRANCH, abs=3)


WGMMA = "HGMMA.64x128x16.F32.BF16"  # 64 x 128 x 16 multiplications: 64 cycles of an H100's 2048 a clock


def test_wgmma_takes_the_tensor_cores_rate():
    """Two warp groups, eight products each a trip, four of them in flight."""
    wait = Instruction("WARPGROUP.DEPBAR.LE", "gsb0, 0x4")
    body = [Instruction(WGMMA, "R24, gdesc[UR4], R24, gsb0")] * 8
    assert close(trip(looped(*body, wait), warps=8), 2 * 8 * 64)
    narrow = [Instruction("HGMMA.64x32x16.F32.BF16", "R24, gdesc[UR4], R24, gsb0")] * 8
    assert close(trip(looped(*narrow, wait), warps=8), 2 * 8 * (64 + 32) * 16 * 2 / 128)  # the port takes longer
    registers = [Instruction("HGMMA.64x32x16.F32.BF16", "R24, R8, gdesc[UR4], R24, gsb0")] * 8
    assert close(trip(looped(*registers, wait), warps=8), 2 * 8 * 16)


def test_waiting_for_every_wgmma_overlaps_nothing_but_a_second_program_does():
    body = [
        Instruction(WGMMA, "R24, gdesc[UR4], R24, gsb0"),
        Instruction("WARPGROUP.DEPBAR.LE", "gsb0, 0x0"),
        *[Instruction("NOP")] * 100,
    ]
    alone = trip(looped(*body), warps=4)
    assert close(alone, 64 + H100.tensor_latency + 103 + BRANCH)
    assert trip(looped(*body), warps=4, resident=2) < 1.1 * 2 * 103  # both issue: twice as much in little more
    behind = [body[0], Instruction("WARPGROUP.DEPBAR.LE", "gsb0, 0x1"), *body[2:]]
    assert trip(looped(*behind), warps=4) < alone - 64


def test_mma_sync_has_a_tensor_core_a_quarter():
    body = [Instruction("HMMA.16816.F32.BF16", "R0, R4, R8, R0")] * 16
    assert close(trip(looped(*body), warps=4, chip=CHIPS[80]), 16 * 4096 / 512)
    assert close(trip(looped(*body), warps=8, chip=CHIPS[80]), 2 * 16 * 4096 / 512)


def test_two_programs_share_what_one_leaves():
    """Latency-bound code runs twice as fast with two programs, issue-bound code no faster."""
    waiting = looped(Instruction("S2R", write=0), Instruction("NOP", wait=1))
    assert close(trip(waiting, warps=4, resident=2), trip(waiting, warps=4))
    assert trip(waiting, warps=4) == pytest.approx(UNIFORM + 2 + BRANCH, abs=2)
    busy = looped(*[Instruction("NOP")] * 100)
    assert close(trip(busy, warps=8, resident=2), 2 * trip(busy, warps=8))


def test_programs_follow_one_another():
    code = [Instruction("NOP", stall=10)] * 10 + [EXIT]
    run = Multiprocessor(code, 4, 2, 6, 1, 0.0, H100.memory, H100).run()
    assert len(run.ends) == 6 and run.ends == sorted(run.ends)
    assert all(life == pytest.approx(100, abs=3) for life in run.lives)


def test_unconditional_branches_are_taken_and_guarded_ones_are_not():
    skipped = [Instruction("NOP", stall=15)] * 10
    taken = [Instruction("BRA", "`(.L_x_1)", target=11), *skipped, EXIT]
    guarded = [Instruction("BRA", "`(.L_x_1)", "@P0", target=11), *skipped, EXIT]
    times = [Multiprocessor(code, 4, 1, 1, 1, 0.0, H100.memory, H100).run().ends[0] for code in (taken, guarded)]
    assert times[0] < 5 and times[1] >= 150


@pytest.mark.parametrize("end", [Instruction("BRA", "`(.L_x_1)", target=6), EXIT], ids=["jump", "exit"])
@pytest.mark.parametrize("guard, operands", [("@P0", "`(.L_x_2)"), ("", "UP0, `(.L_x_2)")])
def test_the_code_for_no_trips_in_front_of_the_loop_is_passed_over(end, guard, operands):
    """As Triton 3.6 puts it: a predicate leads to the loop, and behind the code for none a jump leads over it."""
    in_front = [Instruction("BRA", operands, guard, target=3), Instruction("NOP", stall=15), end]
    code = [*in_front, *[Instruction("NOP", stall=10)] * 2, Instruction("BRA", "`(.L_x_0)", "@P1", target=3), EXIT]
    assert close(trip(code, warps=4), 2 * 10 + 1 + BRANCH)


def test_what_a_predicate_may_pass_over_in_front_of_the_loop_is_run():
    code = [Instruction("BRA", "`(.L_x_1)", "@P0", target=2), *looped(Instruction("NOP"))]
    code[-2] = code[-2]._replace(target=2)
    assert jumps(code) == [None] * len(code)


def test_the_main_loop_is_the_innermost_with_tensor_cores():
    mma = Instruction("HMMA.16816.F32.BF16")
    back = Instruction("BRA", "x", "@P0")
    code = [
        mma,
        back._replace(target=0),
        Instruction("NOP"),
        mma,
        mma,
        back._replace(target=3),
        back._replace(target=2),
        EXIT,
    ]
    assert main_loop(code) == (0, 1)
    longest = [Instruction("NOP"), back._replace(target=0), *[Instruction("NOP")] * 3, back._replace(target=2), EXIT]
    assert main_loop(longest) == (2, 5)
    assert main_loop([mma, EXIT]) is None
    assert Instruction("NOP").write == NO_SCOREBOARD
