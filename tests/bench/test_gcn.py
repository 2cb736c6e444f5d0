"""What is read from the assembly of an AMD GPU."""

from types import SimpleNamespace

import pytest

from bench import gcn
from bench.sass import SHARED_LIMIT

ASSEMBLY = """
\tglobal_load_dwordx4 v[2:5], v[2:3], off
\tbuffer_load_ushort v1, v2, s[0:3], 0 offen
\tglobal_load_dwordx2 v[2:3], v[2:3], off
\tglobal_store_dword v0, v1, s[0:1]
\tv_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1], v[2:3], a[0:15]
\tv_smfmac_f32_16x16x32_f16 v[0:3], v[4:5], v[6:9], v10
\t.amdhsa_private_segment_fixed_size 0
    .private_segment_fixed_size: {stack}
    .sgpr_spill_count: 1
    .vgpr_count:     145
    .vgpr_spill_count: {spills}
"""


def kernel(stack=0, spills=0, **asm):
    text = ASSEMBLY.format(stack=stack, spills=spills)
    return SimpleNamespace(asm={"amdgcn": text, "ttir": "", **asm}, metadata=SimpleNamespace(shared=20480))


def test_resources():
    (found,) = gcn.resources([kernel(stack=8, spills=2)])
    assert found._asdict() == {
        "registers": 145, "stack": 8, "spills": 2, "shared": 20480, "wide_loads": 16 / 26, "wide_stores": 0.0,
        "tensor_cores": {"MFMA": 1, "SMFMAC": 1}, "dots": 0, "conflicts": None, "serial": 0,
    }  # fmt: skip
    assert found.faults("gfx942") == ["spills (8 bytes of stack, 2 instructions)"]
    (moved,) = gcn.resources([kernel(stack=0, spills=2)])  # to other registers
    assert moved.spills == 0 and moved.faults("gfx942") == []
    assert "65536 there are" in found._replace(shared=SHARED_LIMIT["gfx942"] + 1).faults("gfx942")[1]


def test_other_assembly_is_refused():
    with pytest.raises(RuntimeError, match="the assembly tells no private_segment_fixed_size"):
        gcn.resources([kernel(amdgcn="s_endpgm")])
