"""The AMX form of tiles by the instructions that it was compiled to, which `support_amx` computes.

The tests of tiles and of programs run in it too.
"""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import support_amx
import torch
from support_conv import taken_tiles
from support_fused import relative_error

from fastres import create_model, fold, ops
from fastres.ops import cpu
from fastres.ops.cpu import native, tiles

pytestmark = pytest.mark.skipif(
    cpu.unavailable() is not None or native.answer("form") != tiles.FORMS["avx512"] or support_amx.library() is None,
    reason="not an x86 with AVX512-BF16 and a compiler, or it has AMX itself",
)
BF16 = torch.bfloat16
CONFIGURE, ZERO, LOAD, MULTIPLY, RETURN = "c4e2784907", "c4e27b49c0", "c4e27b4b0416", "c4e2725cc2", "c3"
# Maps a page of machine code, and calls it with the address of a configuration, of a tile, and a stride.
CALLING = """
import ctypes, mmap, sys
sys.path.insert(0, sys.argv[1])
import support_amx
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(bytes.fromhex(sys.argv[2]))
config = bytearray(64)
config[0] = 1
for tile in range(8):
    config[16 + 2 * tile], config[48 + tile] = int(sys.argv[3]), 16
buffer, tile = (ctypes.c_char * 64).from_buffer(config), ctypes.create_string_buffer(1024)
function = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
function = function(ctypes.addressof((ctypes.c_char * 6).from_buffer(page)))
with support_amx.emulated() as amx:
    function(ctypes.addressof(buffer), ctypes.addressof(tile), 64)
    print(amx.computed_amx())
"""


def called(code, row_bytes=64):
    command = [sys.executable, "-c", CALLING, str(Path(support_amx.__file__).parent), code, str(row_bytes)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(
    "code, row_bytes, count",
    [
        (CONFIGURE + ZERO + LOAD + RETURN, 64, 3),
        (ZERO + RETURN, 64, None),  # tiles that nobody has set up
        (CONFIGURE + ZERO + RETURN, 65, None),  # rows longer than there are
        (CONFIGURE + ZERO + "0f0b" + RETURN, 64, None),  # ud2, an instruction that is none
        (CONFIGURE + MULTIPLY + RETURN, 32, None),  # as many pairs in a row as there are not rows
    ],
)
def test_what_a_processor_refuses_is_refused(code, row_bytes, count):
    done = called(code, row_bytes)
    if count is None:
        assert done.returncode < 0, done
    else:
        assert (done.returncode, done.stdout) == (0, f"{count}\n"), done.stderr


def test_instructions_of_amx_are_what_runs():
    x, w = torch.randn(2, 8, 8, 64).to(BF16), torch.randn(48, 3, 3, 64).to(BF16)
    given = x, w, 1, (1, 1, 1, 1), 1
    with taken_tiles("plain"):
        before = support_amx.library().computed_amx()
        expected, _ = tiles.conv(*given)
        assert support_amx.library().computed_amx() == before
    with taken_tiles("amx"):
        y, _ = tiles.conv(*given)
    products = 2 * 8 * 8 / 16 * 48 / 16 * 9 * 64 / 32
    assert support_amx.library().computed_amx() - before > products
    assert relative_error(y, expected.double()) < 4e-3


@pytest.mark.parametrize("name, options", [("resnet8", {}), ("notebook", {"num_classes": 3})])
def test_a_network_trains_and_runs_folded(name, options):
    """As in the plain form, but for rounding."""
    torch.manual_seed(0)
    made, images = create_model(name, **options), torch.randn(4, 3, 16, 16)
    results = {}
    for form in ("plain", "amx"):
        model = copy.deepcopy(made)
        with ops.implementation("cpp"), taken_tiles(form), torch.autocast("cpu", BF16):
            model.train()(images).float().square().sum().backward()
            gradients = torch.cat([one.grad.flatten() for one in model.parameters()])
            with torch.no_grad():
                results[form] = gradients, fold(model.eval())(images).float()
    for ours, plain in zip(results["amx"], results["plain"]):
        assert ours.isfinite().all() and relative_error(ours, plain.double()) < 0.05
