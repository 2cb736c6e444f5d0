"""What the machine offers: bf16 by its processor's flags, freed memory kept."""

import io
import os
import platform
import signal
import subprocess
import sys

import pytest
import torch
from support_train import same_weights, tiny_trainer

from fastres.ops import cpu
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


@pytest.mark.parametrize("only", [False, True])
def test_cudnn_times_its_algorithms_unless_they_must_be_deterministic(only):
    before = torch.backends.cudnn.benchmark
    with machine.algorithms(only):
        assert torch.backends.cudnn.benchmark != only
        assert torch.are_deterministic_algorithms_enabled() == only
    assert torch.backends.cudnn.benchmark == before and not torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with machine.algorithms(only):
            assert not torch.backends.cudnn.benchmark and torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("obstacle", [None, "CXX", "LD_PRELOAD"])
def test_what_a_run_does_with_freed_memory(obstacle, recompute, tmp_path):
    """Pages of its own; without a compiler the C library's, kept or returned; of another allocator nothing is asked."""
    script = (
        "import torch\nfrom fastres.ops.cpu import pages\nfrom fastres.train import machine\ncalls = []\n"
        "machine._mallopt = lambda *arguments: calls.append(arguments) is None\n"
        f"machine.treat_freed_memory(torch.device('cpu'), {recompute})\n"
        "x = torch.ones(2**20)\nprint(pages.held().in_use // 2**20, len(calls))"
    )
    environment = {**os.environ, "FASTRES_CACHE": str(tmp_path)}
    if obstacle:
        environment[obstacle] = {"CXX": "no-such-compiler", "LD_PRELOAD": str(tmp_path / "libjemalloc.so")}[obstacle]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=environment)
    pages = obstacle is None and cpu.unavailable() is None
    calls = 0 if obstacle == "LD_PRELOAD" else 1 if recompute and not pages else 2  # one returns, two keep
    assert done.stdout.split() == [str(4 * pages), str(calls)], done.stdout + done.stderr


def switches():
    """All that PyTorch lets one set for the whole process, and that a run might."""
    cudnn = torch.backends.cudnn
    return {
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn": (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.conv.fp32_precision),
        "precision": torch.get_float32_matmul_precision(),
        "matmul": torch.backends.cuda.matmul.fp32_precision,
        "onednn": (torch.backends.mkldnn.conv.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "grad": torch.is_grad_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "random": torch.get_rng_state().tolist(),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "environment": dict(os.environ),
    }


@pytest.mark.parametrize("theirs", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_a_run_leaves_the_process_as_it_was(tmp_path, deterministic, theirs, backend):
    """Building a trainer and training: those that the process had set, and those that it had not."""
    dtype, benchmark = torch.get_default_dtype(), torch.backends.cudnn.benchmark
    if theirs:
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = True
    try:
        before = switches()
        trainer = tiny_trainer(tmp_path, deterministic=deterministic, steps=1, backend=backend)
        assert switches() == before
        assert all(p.dtype == torch.float32 and p.device.type == "cpu" for p in trainer.model.parameters())
        trainer.fit()
        assert switches() == before
    finally:
        torch.set_default_dtype(dtype)
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = benchmark


def test_a_step_is_deterministic_and_the_process_is_not(tmp_path, monkeypatch):
    trainer, seen = tiny_trainer(tmp_path, deterministic=True, steps=1), []
    monkeypatch.setattr(trainer, "learn", lambda *_: seen.append(torch.are_deterministic_algorithms_enabled()))
    trainer.train_step(torch.randn(2, 3, 12, 12), torch.tensor([0, 1]))
    assert seen == [True] and not torch.are_deterministic_algorithms_enabled()
    assert machine._CUBLAS_WORKSPACE not in os.environ


def test_the_seed_alone_makes_the_weights(tmp_path):
    torch.manual_seed(1)
    first = tiny_trainer(tmp_path / "first", steps=1).model.state_dict()
    torch.manual_seed(2)
    again = tiny_trainer(tmp_path / "again", steps=1).model.state_dict()
    other = tiny_trainer(tmp_path / "other", steps=1, seed=5).model.state_dict()
    assert same_weights(first, again) and not same_weights(first, other)


def test_a_first_run_on_a_gpu_says_that_it_builds_kernels(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    gpu = torch.device("cuda")
    assert f"they are kept in {tmp_path / 'triton'}" in machine.building_note(gpu, "fused")
    assert machine.building_note(gpu, "eager") is None and machine.building_note(torch.device("cpu"), "fused") is None
    (tmp_path / "triton" / "kernel").mkdir(parents=True)
    assert machine.building_note(gpu, "fused") is None


def test_a_process_of_the_tests_that_hangs_ends_and_says_where():
    code = "import time, support_process\nsupport_process.begin(0.5)\ndef stuck():\n    time.sleep(100)\nstuck()"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=90)
    assert done.returncode == 1 and "Timeout (0:00:00.500000)!" in done.stderr and " in stuck" in done.stderr
