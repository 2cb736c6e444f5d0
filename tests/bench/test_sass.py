"""Machine code of many kernels read as one, and what counts as a spill."""

import struct

import pytest

from bench import sass
from bench.sass import disassembled, instructions, machine_code, serial_products, uses_frame

HOPPER = ["LDC R1, c[0x0][0x28]", "VIADD R1, R1, 0xfffffff8", "FADD R10, R11, R12"]
AMPERE = ["IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28]", "IADD3 R1, R1, -0x8, RZ", "IMAD.MOV.U32 R10, RZ, RZ, R11"]


@pytest.mark.parametrize(
    "more, uses",
    [
        ("", False),
        ("@!P0 IADD3 R1, R1, -0x8, RZ", False),
        ("STL [R1], R0", True),
        ("@P1 LDL.64 R4, [R1+0x8]", True),
        ("MOV R2, R1", True),
    ],
)
def test_a_frame_is_used_where_its_address_is(more, uses):
    """One that is only set up holds no spilled register."""
    for code in (HOPPER, AMPERE):
        assert uses_frame("\n".join([*code, more])) is uses


WAIT, NEXT = "WARPGROUP.DEPBAR.LE gsb0, 0x0", "WARPGROUP.ARRIVE"


@pytest.mark.parametrize(
    "lines, count",
    [
        (["{product}", "{product}, gsb0", WAIT], 0),
        (["{product}, gsb0", WAIT, NEXT, "{product}, gsb0", WAIT, NEXT, "{product}, gsb0"], 2),
        (["{product}, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x1", NEXT, "{product}, gsb0"], 0),  # the one before that
        (["{product}, gsb0", WAIT, NEXT, "HGMMA.64x128x16.F32.BF16 R88, gdesc[UR4], R88, gsb0"], 0),  # another product
        (["{product}, gsb0", WAIT, "BRA `(.L_x_1)", "{product}, gsb0"], 0),  # another trip
        (["HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR4], R24, gsb0", WAIT, NEXT] * 2, 0),  # Triton's own wait
    ],
)
def test_products_that_wait_for_one_another(lines, count):
    code = "\n".join(lines).format(product="HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8].tnspA, R24")
    assert serial_products(instructions(code)) == count


def elf(*sections):
    """An ELF file of these sections, by name, as far as `machine_code` reads it."""
    names = b"\0" + b"".join(name.encode() + b"\0" for name, _ in sections) + b".shstrtab\0"
    held = [*sections, (".shstrtab", names)]
    body, table = b"", b""
    for name, content in held:
        at = names.index(name.encode() + b"\0")
        table += struct.pack("<IIQQQQ", at, 1, 0, 0, 64 + len(body), len(content)) + bytes(24)
        body += content
    header = bytearray(64)
    struct.pack_into("<Q", header, 0x28, 64 + len(body))
    struct.pack_into("<HHH", header, 0x3A, 64, len(held), len(held) - 1)
    return bytes(header) + body + table


def test_the_kernels_own_section_is_found():
    cubin = elf((".nv.info", b"other"), (".text.some_kernel", b"c" * 32), (".nv.constant0.some_kernel", b"k"))
    assert machine_code(cubin) == b"c" * 32
    with pytest.raises(RuntimeError, match="without a section"):
        machine_code(elf((".nv.info", b"other")))


def test_kernels_that_are_disassembled_as_one_have_their_own_lines(monkeypatch):
    """Labels and encodings between them are no instructions; other numbers of instructions than there are refused."""
    lines = ["/*0000*/ MOV R1, c[0x0][0x28] ;", "/*0010*/ @P0 EXIT ;", ".L_1:", "/*0020*/ BRA `(.L_1) ; /* 0xff */"]
    asked = []

    def tool(name, *arguments):
        asked.append((name, *arguments[:2], arguments[2].read_bytes()))
        return "\n".join(lines)

    monkeypatch.setattr(sass, "_tool", tool)
    cubins = [elf((".text.a", b"a" * 32)), elf((".text.b", b"b" * 16))]
    first, second = disassembled(cubins, 90)
    assert first == "MOV R1, c[0x0][0x28] \n@P0 EXIT " and second == "BRA `(.L_1) "
    assert asked == [("nvdisasm", "-b", "SM90", b"a" * 32 + b"b" * 16)]
    lines.pop()
    with pytest.raises(RuntimeError, match="finds 2 instructions of sm_90, 3 there are"):
        disassembled(cubins, 90)
