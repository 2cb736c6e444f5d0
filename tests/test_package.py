"""What ``import fastres`` offers, what it costs, and what is installed."""

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fastres


def test_the_public_functions_are_those_of_their_rooms():
    from fastres.models import create_model
    from fastres.nn import fold, fuse, unfuse

    assert (fastres.fuse, fastres.unfuse, fastres.fold, fastres.create_model) == (fuse, unfuse, fold, create_model)
    assert {"fuse", "unfuse", "fold", "create_model"} <= set(dir(fastres))
    with pytest.raises(AttributeError, match="'fastres' has no attribute 'fuze'"):
        fastres.fuze  # noqa: B018


def test_importing_the_package_imports_no_framework():
    code = "import fastres, sys; print([m for m in ('torch', 'triton', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_kernels_are_a_package_of_fastres_in_a_checkout_too():
    """And nothing else of the checkout is."""
    from fastres import kernels

    where = Path(fastres.__file__).parent
    assert list(fastres.__path__) == [str(where)] and list(kernels.__path__) == [str(where / "kernels")]
    for other in ("tests", "bench", "docs"):
        assert importlib.util.find_spec(f"fastres.{other}") is None


def test_a_wheel_has_all_that_runs_and_nothing_else(tmp_path):
    """Built without isolation, so without a network."""
    setuptools = pytest.importorskip("setuptools", minversion="65")
    assert setuptools
    root = Path(__file__).parent.parent
    left_out = shutil.ignore_patterns(".*", "__pycache__", "build", "*.egg-info", "results", "runs")
    shutil.copytree(root, tmp_path / "checkout", symlinks=True, ignore=left_out)
    code = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "checkout", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = (tmp_path / "checkout").glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = [*(root / "fastres").rglob("*"), *(root / "kernels").glob("*.py")]
    expected = {
        f"fastres/{file.relative_to(root)}" if file.parent == root / "kernels" else str(file.relative_to(root))
        for file in files
        if file.suffix in (".py", ".cpp", ".h", ".typed")
    }
    assert names == expected
    metadata = zipfile.ZipFile(wheel).read(f"{wheel.name.rsplit('-', 3)[0]}.dist-info/METADATA").decode()
    assert "License: Apache-2.0" in metadata and "Author: fastres developers" in metadata
