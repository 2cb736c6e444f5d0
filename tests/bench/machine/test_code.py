"""Reading machine code, pipes and occupancy."""

import pytest

from bench.machine.assembly import Instruction, parse
from bench.machine.chips import CHIPS, variants
from bench.machine.occupancy import residents
from bench.machine.pipes import moved, operations, pipe, tensor_cycles, unmodelled, wgmma_bytes

LISTING = """
.text.some_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;                     /* 0x00000a00ff017b82 */
                                                                              /* 0x000e700000000800 */
.L_x_1:
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR8][R2.64] ;           /* 0x0000000802048981 */
                                                                              /* 0x004ea8000c1e1d00 */
        /*0020*/               @P4 BRA `(.L_x_1) ;                            /* 0xffffffe800204947 */
                                                                              /* 0x000fea000383ffff */
        /*0030*/                   EXIT ;                                     /* 0x000000000000794d */
                                                                              /* 0x000fea0003800000 */
.L_x_2:
        /*0040*/                   BRA `(.L_x_2);                             /* 0xfffffffc00fc7947 */
                                                                              /* 0x000fc0000383ffff */
"""


def test_instructions_have_their_control_fields():
    load_constant, load, branch, end = parse(LISTING)  # without the padding behind the last EXIT
    assert load_constant == Instruction("LDC", "R1, c[0x0][0x28]", "", 8, 1, 7, 0)
    assert (load.name, load.guard, load.stall, load.write, load.read, load.wait) == ("LDG", "@!P0", 4, 2, 7, 4)
    assert (branch.target, branch.guard, end.mnemonic) == (1, "@P4", "EXIT")
    with pytest.raises(ValueError, match="nvdisasm"):
        parse("no code")


@pytest.mark.parametrize(
    "registers, shared, warps, arch, expected",
    [
        (128, 0, 8, 90, 2),  # 65536 registers are 16 warps of 128
        (129, 0, 8, 90, 1),  # given out by 256 a warp: 136
        (168, 100_000, 8, 90, 1),
        (32, 0, 8, 90, 8),  # 64 warps
        (32, 74 * 1024, 4, 90, 3),  # 228 KB, and 1 KB more for each
        (32, 0, 1, 90, 32),  # programs
        (32, 0, 8, 89, 6),  # 48 warps
        (64, 70_000, 4, 80, 2),  # 164 KB
    ],
)
def test_occupancy(registers, shared, warps, arch, expected):
    assert residents(registers, shared, warps, CHIPS[arch]) == expected


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="shared memory"):
        residents(32, 120_000, 4, CHIPS[89])
    with pytest.raises(ValueError, match="registers"):
        residents(255, 0, 16, CHIPS[90])


def test_pipes_and_bytes():
    names = {"FFMA": "fma", "IMAD.WIDE": "imad", "LOP3.LUT": "alu", "MUFU.RCP": "transcendental",
             "LDSM.16.M88.4": "memory", "UIADD3": "uniform", "BAR.SYNC": "",
             "HGMMA.64x128x16.F32.BF16": ""}  # fmt: skip
    assert {name: pipe(Instruction(name))[0] for name in names} == names
    sizes = {"LDG.E": 128, "LDG.E.128": 512, "LDG.E.U16": 64, "LDSM.16.M88.4": 512, "STS.64": 256, "LDG.E.U8": 32}
    assert {name: moved(Instruction(name)) for name in sizes} == sizes
    assert moved(Instruction("LDG.E.128", guard="@!PT")) == 0


def test_products():
    wide = Instruction("HGMMA.64x128x16.F32.BF16", "R24, gdesc[UR4], R24, gsb0")
    assert operations(wide) == 2 * 64 * 128 * 16 and tensor_cycles(wide, CHIPS[90]) == 64
    assert wgmma_bytes(wide) == (64 + 128) * 16 * 2
    assert wgmma_bytes(wide._replace(operands="R24, R8, gdesc[UR4], R24")) == 128 * 16 * 2
    tf32 = Instruction("HGMMA.64x128x8.F32.TF32", "R24, gdesc[UR4], R24")
    assert tensor_cycles(tf32, CHIPS[90]) == 64 and wgmma_bytes(tf32) == (64 + 128) * 8 * 4
    small = Instruction("HMMA.16816.F32.BF16")
    assert tensor_cycles(small, CHIPS[80]) == 8 and tensor_cycles(small, CHIPS[89]) == 32
    with pytest.raises(ValueError, match="shape unknown"):
        operations(Instruction("HMMA.99.F32"))


def test_what_the_code_does_not_tell_is_not_modelled():
    tensor_memory = [Instruction("UTCHMMA"), Instruction("LDTM.x64")]
    assert unmodelled(tensor_memory) == "LDTM, UTCHMMA: what they do is not in the machine code"
    assert unmodelled([Instruction("HMMA.16816.F32.BF16")]) == ""


def test_peaks_are_the_data_sheets():
    """bf16 with fp32 sums, TFLOP/s, dense; the clocks of H100, A100 and B200 are below the boost that those are of."""
    sheets = {80: 312, 86: 71, 89: 165, 90: 989, 100: 2250, 120: 210}
    assert {arch: chip.peak / 1e12 / sheets[arch] for arch, chip in CHIPS.items()} == {
        arch: pytest.approx(0.97, abs=0.04) for arch in CHIPS
    }
    assert list(variants(CHIPS[90])) == ["assumed", "slower L2", "faster on chip"]
