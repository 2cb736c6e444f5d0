"""Conflicts between banks, and the arithmetic on addresses that tells them."""

import numpy as np
import pytest

from bench.machine.assembly import Instruction
from bench.machine.banks import addresses, conflicts, port_cycles

LANES = np.arange(32)


def code(*lines):
    found = []
    for line in lines:
        guard, _, rest = line.partition(" ") if line[0] == "@" else ("", "", line)
        mnemonic, _, operands = rest.partition(" ")
        found.append(Instruction(mnemonic, operands, guard))
    return found


def cycles(*lines):
    """Of the last line, behind the thread's number in R0."""
    return port_cycles(code("S2R R0, SR_TID.X", *lines))[-1]


@pytest.mark.parametrize(
    "stride, suffix, expected",
    [
        (4, "", 1),  # a word each
        (0, "", 1),  # the same word
        (8, "", 2),
        (12, "", 1),  # an odd number of words
        (256, "", 32),  # all in one bank
        (8, ".64", 2),  # without conflicts, in two halves
        (16, ".128", 4),
        (128, ".128", 32),
        (2, ".U16", 1),  # two lanes a word
    ],
)
def test_lanes_at_a_stride(stride, suffix, expected):
    assert cycles(f"IMAD R1, R0, {stride:#x}, RZ", f"STS{suffix} [R1+0x100], R2") == expected
    assert cycles(f"IMAD R1, R0, {stride:#x}, RZ", f"LDS{suffix} R2, [R1+UR4+0x100]") is None  # UR4 is not known
    assert cycles("UMOV UR4, 0x400", f"IMAD R1, R0, {stride:#x}, RZ", f"LDS{suffix} R2, [R1+UR4]") == expected


def test_rows_of_matrices():
    """Eight lanes have the addresses of a matrix' rows, of 16 bytes."""
    assert cycles("IMAD R1, R0, 0x10, RZ", "LDSM.16.M88.4 R4, [R1]") == 4
    assert cycles("IMAD R1, R0, 0x80, RZ", "LDSM.16.M88.4 R4, [R1]") == 32
    assert cycles("IMAD R1, R0, 0x80, RZ", "LDSM.16.M88.2 R4, [R1]") == 16
    swizzled = "LOP3.LUT R2, R0, 0x7, RZ, 0xc0, !PT", "IMAD R2, R2, 0x10, RZ", "LOP3.LUT R1, R1, R2, RZ, 0x3c, !PT"
    assert cycles("IMAD R1, R0, 0x80, RZ", *swizzled, "LDSM.16.M88.4 R4, [R1]") == 4


@pytest.mark.parametrize(
    "lines, expected",
    [
        (["IADD3 R1, -R0, 0x20, RZ"], 32 - LANES),
        (["IADD3 R1, P0, R0, 0x20, R0"], 2 * LANES + 32),
        (["LEA R1, R0, 0x40, 0x3"], 8 * LANES + 64),
        (["LEA.HI R1, R0, 0x40, RZ, 0x1e"], 64 + LANES // 4),
        (["SHF.R.U32.HI R1, RZ, 0x2, R0"], LANES // 4),
        (["SHF.L.U32 R1, R0, 0x2, RZ"], 4 * LANES),
        (["LOP3.LUT R1, R0, 0x7, RZ, 0xc0, !PT"], LANES & 7),
        (["LOP3.LUT R1, R0, 0x7, 0x10, 0xf8, !PT"], LANES | 7 & 16),
        (["LOP3.LUT R1, R0, 0x7, RZ, 0x3c, !PT"], LANES ^ 7),
        (["SGXT.U32 R1, R0, 0x3"], LANES & 7),
        (["PRMT R1, R0, 0x1004, R0"], LANES | LANES << 8 | LANES << 16),
        (["IMAD.MOV.U32 R1, RZ, RZ, R0.reuse"], LANES),
        (["ISETP.GE.AND P0, PT, R0, 0x10, PT", "SEL R1, R0, RZ, P0"], np.where(LANES >= 16, LANES, 0)),
        (["LOP3.LUT P0, RZ, R0, 0x10, RZ, 0xc0, !PT", "SEL R1, R0, RZ, !P0"], np.where(LANES < 16, LANES, 0)),
        (["MOV R1, 0x5", "ISETP.LT.U32.AND P1, PT, R0, 0x8, PT", "@P1 MOV R1, R0"], np.where(LANES < 8, LANES, 5)),
        (["R2UR UR5, R0", "IADD3 R1, R0, UR5, RZ"], LANES),
        (["CS2R R0, SRZ"], 0 * LANES),  # R1 is the second of its pair
    ],
)
def test_addresses_are_computed(lines, expected):
    stored = addresses(code("S2R R0, SR_TID.X", *lines, "STS [R1], R3"))[-1]
    assert np.array_equal(stored, expected & 0xFFFFFFFF)


@pytest.mark.parametrize(
    "line",
    ["LDG.E R1, [R4.64]", "IMAD.HI.U32 R1, R0, R0, RZ", "IADD3.X R1, R0, R0, RZ, P0, !PT", "@P3 MOV R1, R0",
     "LDS.128 R0, [R9]", "I2F R1, R0", "LEA R1, R0, R0", "IADD3 R1", "IADD3 R9, P3, R0, R0, RZ\n@P3 MOV R1, R0"],
)  # fmt: skip
def test_what_depends_on_anything_else_is_not_known(line):
    assert cycles("MOV R1, 0x4", "STS [R1], R3") == 1
    assert cycles("MOV R1, 0x4", *line.splitlines(), "STS [R1], R3") is None


def test_conflicts_of_a_kernel():
    assert conflicts(code("S2R R0, SR_TID.X", "MOV R1, R0")) is None
    strided = "S2R R0, SR_TID.X", "IMAD R1, R0, 0x40, RZ", "STS [R1], R3"
    assert conflicts(code(*strided)) == 16
    assert conflicts(code(*strided, "STS.128 [R7], R4")) == pytest.approx(20 / 5)  # of R7 nothing is known
    assert conflicts(code(*strided[:2], "@!PT STS [R1], R3")) is None
