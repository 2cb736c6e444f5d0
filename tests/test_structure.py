"""The shape of the code: what reads well is kept so."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OPS = sorted((ROOT / "fastres" / "ops").rglob("*.py"))
LIBRARY = sorted((ROOT / "fastres").rglob("*.py"))


def functions(path):
    tree = ast.parse(path.read_text())
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


@pytest.mark.parametrize("path", OPS, ids=lambda path: str(path.relative_to(ROOT)))
def test_operations_take_few_positional_arguments(path):
    many = []
    for function in functions(path):
        names = [one.arg for one in (*function.args.posonlyargs, *function.args.args)]
        names = [name for name in names if name not in ("self", "cls", "ctx")]
        if len(names) > 8:
            many.append(f"{function.name} takes {len(names)}")
    assert not many


def test_library_code_has_no_mocks_and_no_dispatch_by_name():
    for path in LIBRARY:
        text = path.read_text()
        assert "unittest.mock" not in text and "from unittest import mock" not in text, path
        if path in OPS:
            assert not [one for one in functions(path) if one.name in ("__getattr__", "__getattribute__")], path


ROOMS = ["cli", "commands", "train", "models", "nn", "ops", "kernels"]  # the upper rooms first


@pytest.mark.parametrize("room", ROOMS[2:])
def test_no_file_imports_upward(room):
    above = {f"fastres.{name}" for name in ROOMS[: ROOMS.index(room)]}
    folder = ROOT / "kernels" if room == "kernels" else ROOT / "fastres" / room
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [one.name for one in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            for name in names:
                assert ".".join(name.split(".")[:2]) not in above, f"{path.relative_to(ROOT)} imports {name}"
