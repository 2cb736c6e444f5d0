"""What ``import fastres`` offers, and what it costs."""

import subprocess
import sys

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
