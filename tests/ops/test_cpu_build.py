"""The compiled passes: built once, replaced when damaged, done without where they cannot be built."""

import os
import stat
from pathlib import Path

import pytest
import torch

from fastres import ops
from fastres.ops import cpu
from fastres.ops.cpu import build, passes


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """An empty cache folder, a source that compiles at once, and nothing loaded yet."""
    source = tmp_path / "source.cpp"
    source.write_text("#include <vector>\nextern \"C\" int fastres_answer() { return 42; }\n")
    monkeypatch.setattr(build, "_SOURCES", (source,))
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


def test_a_damaged_library_is_compiled_again(compiler, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_cpu", lambda: "a CPU whose library is not loaded yet")
    library = tmp_path / "cache" / f"passes-{build._key(build._compiler())}.so"
    library.write_bytes(b"no library")
    assert again() is None and library.stat().st_size > 1000


def test_another_compiler_or_cpu_has_its_own_library(compiler, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_cpu", lambda: "another CPU")
    assert again() is None and len(compiled(tmp_path)) == 2


def test_a_plain_cpu_has_no_weight_gradient(compiler, monkeypatch):
    """What needs AVX512-BF16 is left out where the compiler may not take it for granted."""
    source = Path(build.__file__).with_name("weight_grad.cpp")
    monkeypatch.setattr(build, "_SOURCES", (source,))
    monkeypatch.setattr(build, "_FOR_THIS_CPU", ((),))
    for known in (passes.has_weight_grad, passes.uses_weight_grad):
        known.cache_clear()
    assert again() is None and not passes.has_weight_grad() and not passes.uses_weight_grad()
    for known in (passes.has_weight_grad, passes.uses_weight_grad):
        known.cache_clear()


def test_no_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no C++ compiler (no-such-compiler): install one, or name it in CXX" in cpu.unavailable()
    with ops.implementation("auto"):
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        x = torch.randn(1, 2, 2, 3)
        out, _ = ops.bn_relu(x, ops.Norm(None, None))
    torch.testing.assert_close(out, torch.nn.functional.batch_norm(x.permute(0, 3, 1, 2), None, None, training=True)
                               .relu().permute(0, 2, 3, 1))
    with pytest.raises(RuntimeError, match="no C"):
        build.library()


def test_a_compiler_that_fails(monkeypatch, tmp_path):
    script = tmp_path / "cxx"
    script.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho cannot compile >&2\nexit 1\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(script))
    assert "failed: cannot compile" in cpu.unavailable()
    assert not compiled(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "cache").mkdir(mode=0o500)
    assert "Permission denied" in cpu.unavailable()


def test_a_file_in_the_folders_place(monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("")
    assert cpu.unavailable() is not None
