"""What the machine offers: bf16 by its processor's flags, freed memory kept."""

import io
import os
import platform
import subprocess
import sys

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


def test_a_compiler_that_is_missing_is_known_before_the_work_starts(tmp_path):
    script = (
        "import torch\nfrom fastres.errors import FastresError\nfrom fastres.train import machine\n"
        "try:\n    machine.check_compile(torch.device('cpu'))\n"
        "except FastresError as error:\n    print(error)"
    )
    absent = {"CXX": str(tmp_path / "none"), "PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **absent}, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.startswith("torch.compile does not work on cpu here ("), done.stderr
    assert "leave out --compile, or install a C++ compiler" in done.stdout and done.stdout.count("\n") == 1


def test_cudnn_times_its_algorithms_unless_results_must_repeat(monkeypatch):
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda only: None)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    for only in (False, True):
        machine.set_deterministic(only)
        assert torch.backends.cudnn.benchmark != only


def test_freed_memory_is_kept_where_the_c_library_can():
    assert machine.keep_freed_memory() == (platform.libc_ver()[0] == "glibc")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize("how, returned", [("keep_freed_memory", False), ("return_freed_memory", True)])
def test_freed_memory_is_kept_or_returned(how, returned):
    """64 buffers of 4 MiB, freed but for the last one, which lies above them in the heap."""
    script = (
        "import torch\nfrom fastres.train import machine\n"
        "def resident():\n"
        "    return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmRSS')) / 1024\n"
        f"assert machine.{how}()\n"
        "tensors = [torch.ones(2**20) for _ in range(64)]\nfull = resident()\n"
        "del tensors[:-1]\nprint(full - resident())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (float(done.stdout) > 200) == returned, done.stdout + done.stderr
