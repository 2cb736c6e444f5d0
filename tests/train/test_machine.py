"""What the machine offers: bf16 by its processor's flags, freed memory kept."""

import io
import platform

import pytest
import torch

from fastres.train import machine


@pytest.mark.parametrize(
    "flags, precision, expected",
    [
        ("fpu avx512f avx512_bf16", "auto", torch.bfloat16),
        ("fpu amx_tile amx_bf16", "auto", torch.bfloat16),
        ("fpu avx512f avx512bw", "auto", torch.float32),
        ("fpu avx512f", "bf16", torch.bfloat16),
        ("fpu avx512_bf16", "fp16", torch.float16),
    ],
)
def test_precision_on_a_cpu(flags, precision, expected, monkeypatch):
    monkeypatch.setattr("builtins.open", lambda path, *_: io.StringIO(f"flags : {flags}\n"))
    assert machine.pick_dtype(precision, torch.device("cpu")) == expected


def test_a_system_without_cpuinfo_computes_in_fp32(monkeypatch):
    def absent(path, *_):
        raise FileNotFoundError(path)

    monkeypatch.setattr("builtins.open", absent)
    assert machine.pick_dtype("auto", torch.device("cpu")) == torch.float32


def test_freed_memory_is_kept_where_the_c_library_can():
    assert machine.keep_freed_memory() == (platform.libc_ver()[0] == "glibc")
