"""The compiled passes: built once, replaced when damaged, done without where they cannot be built."""

import ctypes
import errno
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fastres import ops
from fastres.ops import cpu
from fastres.ops.backends import launches
from fastres.ops.cpu import build, native, tiles

SOURCES = (*build.PASSES.files, *build.PAGES.files, *launches.SOURCES.files)


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """An empty cache folder, a source that compiles at once, and nothing loaded yet."""
    source = tmp_path / "source.cpp"
    source.write_text('#include <vector>\nextern "C" int fastres_answer() { return 42; }\n')
    monkeypatch.setattr(build, "PASSES", build.PASSES._replace(files=(source,)))
    monkeypatch.setenv("FASTRES_CACHE", str(tmp_path / "cache"))
    build._loaded.cache_clear()
    yield
    build._loaded.cache_clear()


def compiled(tmp_path):
    return list((tmp_path / "cache").glob("*.so"))


def again():
    build._loaded.cache_clear()
    return cpu.unavailable()


@pytest.fixture
def compiler():
    """Skips where there is none."""
    if reason := cpu.unavailable():
        pytest.skip(reason)


def test_it_is_compiled_once(compiler, tmp_path):
    (library,) = compiled(tmp_path)
    before = library.stat().st_mtime_ns
    assert again() is None and library.stat().st_mtime_ns == before
    assert os.listdir(library.parent) == [library.name], "temporary files are left"


@pytest.mark.parametrize("locks", [True, False])
def test_of_several_that_start_together_one_compiles(compiler, tmp_path, monkeypatch, locks):
    """As ranks do; where the file system has no locks each of them does."""
    log, script = tmp_path / "log", tmp_path / "cxx"
    script.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] || {{ echo compiling >> {log}; sleep 0.5; }}\n'
        f'exec {build._compiler()[0]} "$@"\n'
    )
    script.chmod(0o700)
    monkeypatch.setenv("CXX", str(script))
    if not locks:
        monkeypatch.setattr(build.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "no locks")))
    with ThreadPoolExecutor(3) as pool:
        loaded = list(pool.map(lambda _: build._loaded.__wrapped__(), range(3)))
    assert all(isinstance(one, ctypes.CDLL) for one in loaded)
    assert (len(log.read_text().split()) == 1) == locks
    assert all(name.startswith("passes-") for name in os.listdir(tmp_path / "cache"))


def test_compiling_is_said_and_loading_is_not(compiler, monkeypatch, caplog):
    monkeypatch.setattr(build, "_cpu", lambda: "a CPU that nothing was compiled for")
    assert again() is None and "compiling the fused passes for this CPU, once" in caplog.text
    caplog.clear()
    assert again() is None and not caplog.text


def test_a_damaged_library_is_compiled_again(compiler, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_cpu", lambda: "a CPU whose library is not loaded yet")
    library = tmp_path / "cache" / f"passes-{build._key(build.PASSES, build._compiler())}.so"
    library.write_bytes(b"no library")
    assert again() is None and library.stat().st_size > 1000


@pytest.mark.parametrize("damage", ["bit of the code", "bit of the digest", "cut", "empty", "no digest"])
def test_a_library_is_loaded_only_as_it_was_written(compiler, tmp_path, damage, monkeypatch):
    (library,) = compiled(tmp_path)
    whole = library.read_bytes()
    spoilt = bytearray(whole)
    if damage.startswith("bit"):
        spoilt[-1 if damage.endswith("digest") else len(whole) // 2] ^= 1
    library.unlink()  # the loaded one stays as it is
    library.write_bytes(
        {"cut": whole[: len(whole) // 2], "empty": b"", "no digest": whole[:-100]}.get(damage, bytes(spoilt))
    )
    library.chmod(0o600)
    loads = []

    class Noted(ctypes.CDLL):
        def __init__(self, path):
            loads.append(Path(path).read_bytes())
            super().__init__(path)

    monkeypatch.setattr(build.ctypes, "CDLL", Noted)
    assert again() is None and loads == [library.read_bytes()] and build._is_whole(library)
    assert len(compiled(tmp_path)) == 1 and os.listdir(library.parent) == [library.name]


def test_a_library_that_another_user_could_have_written(compiler, tmp_path, monkeypatch):
    (library,) = compiled(tmp_path)
    assert stat.S_IMODE(library.stat().st_mode) == 0o600 and stat.S_IMODE(library.parent.stat().st_mode) == 0o700
    library.chmod(0o666)
    assert not build._is_whole(library)
    assert again() is None and stat.S_IMODE(library.stat().st_mode) == 0o600
    if os.geteuid() == 0:
        os.chown(library, 12345, 12345)
        assert not build._is_whole(library)


def test_a_compiler_with_arguments(compiler, monkeypatch, tmp_path):
    name = build._compiler()[0]
    monkeypatch.setenv("CXX", f"{name} -DARGUMENT")
    assert build._compiler() == [name, "-DARGUMENT"] and again() is None
    spaced = tmp_path / "a compiler"
    spaced.symlink_to(name)
    monkeypatch.setenv("CXX", str(spaced))
    assert build._compiler() == [str(spaced)]


def test_another_compiler_or_cpu_has_its_own_library(compiler, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_cpu", lambda: "another CPU")
    assert again() is None and len(compiled(tmp_path)) == 2


def test_a_plain_cpu_has_only_plain_tiles(compiler, monkeypatch):
    """What needs AVX512-BF16 is left out where the compiler may not take it for granted; then PyTorch's convolutions
    run."""
    names = ("conv.cpp", "packing.cpp", "conv_calls.cpp", "weight_grad.cpp", "few_channels.cpp")
    files = tuple(Path(build.__file__).with_name(name) for name in names)
    monkeypatch.setattr(build, "PASSES", build.PASSES._replace(files=files))
    monkeypatch.setattr(build, "_FOR_THIS_CPU", ((),))
    monkeypatch.delenv("FASTRES_TILES", raising=False)
    monkeypatch.setattr(native, "_functions", {})
    tiles.form.cache_clear()
    try:
        assert again() is None and native.answer("form") == 0 and tiles.form() is None
        assert not tiles.takes(torch.bfloat16)
    finally:
        tiles.form.cache_clear()


def test_no_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no C++ compiler (no-such-compiler): install one, or name it in CXX" in cpu.unavailable()
    with ops.implementation("auto"):
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        x = torch.randn(1, 2, 2, 3)
        out, _ = ops.bn_relu(x, ops.Norm(None, None))
    torch.testing.assert_close(
        out, torch.nn.functional.batch_norm(x.permute(0, 3, 1, 2), None, None, training=True).relu().permute(0, 2, 3, 1)
    )
    with pytest.raises(RuntimeError, match="no C"):
        build.library()


def test_a_compiler_that_fails(monkeypatch, tmp_path):
    script = tmp_path / "cxx"
    script.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho cannot compile >&2\nexit 1\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(script))
    assert "failed: cannot compile" in cpu.unavailable()
    assert not compiled(tmp_path)


def test_a_folder_that_cannot_be_made(monkeypatch, tmp_path):
    """The library is kept elsewhere."""
    (tmp_path / "cache").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    if (reason := cpu.unavailable()) is None:
        assert len(list((tmp_path / "elsewhere" / "fastres").glob("*.so"))) == 1
    else:
        assert "compiler" in reason


OMP = """
#pragma once
extern "C" int omp_get_num_threads(void), omp_get_thread_num(void);
"""
# As `python -m ziglang` calls them: with AMX, with AVX512-BF16, with neither; ARM without and with SVE.
MACHINES = ["x86_64 sapphirerapids", "x86_64 znver5", "x86_64 x86_64_v2", "aarch64 generic", "aarch64 neoverse_v1"]


@pytest.mark.skipif(find_spec("ziglang") is None, reason="no cross compiler: pip install ziglang")
@pytest.mark.parametrize("machine", MACHINES)
def test_clang_compiles_it_for_other_machines(machine, tmp_path):
    """Without a warning; nothing is run, as there is no such machine."""
    (tmp_path / "omp.h").write_text(OMP)
    name, cpu = machine.split()
    compiler = [
        sys.executable,
        "-m",
        "ziglang",
        "c++",
        "-target",
        f"{name}-linux-gnu",
        f"-mcpu={cpu}",
        "-Wall",
        "-Werror",
    ]
    torch_headers = Path(torch.__file__).parent / "include"
    options = [*build._FLAGS[:1], "-O1", "-fopenmp", "-fPIC", f"-I{tmp_path}", f"-isystem{torch_headers}"]
    for source in SOURCES:
        command = [
            *compiler,
            *options,
            "-Wno-pass-failed",
            "-Wno-psabi",
            "-c",
            str(source),
            "-o",
            str(tmp_path / "made.o"),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{source.name}: {done.stderr[:2000]}"
