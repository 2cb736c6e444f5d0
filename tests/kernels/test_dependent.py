"""Programmatic dependent launch: every kernel waits before it touches memory, and nobody asks for it unless told."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import fastres.kernels
from fastres.kernels.dependent import ENVIRONMENT, is_programmatic, programmatic

KERNELS = sorted(Path(fastres.kernels.__file__).parent.glob("*.py"))


def functions() -> dict[str, ast.FunctionDef]:
    """Every function under ``triton.jit`` by name."""
    found = (node for path in KERNELS for node in ast.walk(ast.parse(path.read_text())))
    return {
        node.name: node
        for node in found
        if isinstance(node, ast.FunctionDef)
        and any(ast.unparse(one).startswith("triton.jit") for one in node.decorator_list)
    }


def launched() -> set[str]:
    """The names of those that are launched."""
    calls = (node for path in KERNELS for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    return {ast.unparse(call.args[0]) for call in calls if ast.unparse(call.func) == "launch"}


@pytest.mark.parametrize("name", sorted(launched()))
def test_a_kernel_begins_with_its_wait(name):
    first, *rest = functions()[name].body
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):  # the docstring
        first = rest[0]
    assert ast.unparse(first) == "await_inputs()"


def test_the_environment_turns_it_on(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    assert not is_programmatic()
    monkeypatch.setenv(ENVIRONMENT, "1")
    assert is_programmatic()
    monkeypatch.setenv(ENVIRONMENT, "yes")
    with pytest.raises(ValueError, match="FASTRES_PDL=yes: choose 0 or 1"):
        is_programmatic()


def test_what_is_told_holds_inside_and_in_all_threads(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "1")
    seen: list[bool] = []
    with programmatic(False):
        thread = threading.Thread(target=lambda: seen.append(is_programmatic()))
        thread.start()
        thread.join()
        with programmatic(None):
            seen.append(is_programmatic())
        with programmatic(True):
            seen.append(is_programmatic())
        seen.append(is_programmatic())
    assert seen == [False, False, True, False] and is_programmatic()


COMPILED = """
import json
import torch
import torchvision
from triton.backends.compiler import GPUTarget
from bench.launches import recorded
from bench.sass import SHARED_LIMIT, disassembled
from fastres.kernels.dependent import programmatic
from fastres.kernels.resources import shared_memory_of
from fastres.nn import fuse

def kernels(arch, on):
    block = fuse(torchvision.models.resnet.Bottleneck(256, 64)).bfloat16()
    with programmatic(on), shared_memory_of(SHARED_LIMIT[arch], arch), recorded() as launches:
        block(torch.empty(128, 256, 28, 28, dtype=torch.bfloat16).requires_grad_()).sum().backward()
    return {one.specialisation.kernel: one.specialisation for one in launches}

found = {}
for name, arch, on in (("sm_80", 80, True), ("sm_90, off", 90, False), ("sm_90", 90, True)):
    made = kernels(arch, on)
    found[name] = {kernel: dict(one.options) for kernel, one in made.items()}
compiled = {kernel: one.compile(GPUTarget("cuda", 90, 32)) for kernel, one in made.items()}
codes = disassembled([one.asm["cubin"] for one in compiled.values()], 90)
print(json.dumps({
    "options": found,
    "asked": {name: bool(one.metadata.launch_pdl) for name, one in compiled.items()},
    "code": dict(zip(compiled, codes)),
}))
"""
MEMORY = ("LD", "ST", "UTMA", "RED", "ATOM")  # how what touches memory begins, beside parameters and local memory


def test_compiled_kernels_wait_before_they_touch_memory():
    """Machine code of a bottleneck's kernels for sm_90: the next kernel is let in, the one before waited for, then
    memory. No other GPU is asked for it."""
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", ENVIRONMENT)}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    done = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    asked = {name: {bool(one.get("launch_pdl")) for one in of.values()} for name, of in found["options"].items()}
    assert asked == {"sm_80": {False}, "sm_90, off": {False}, "sm_90": {True}}
    assert len(found["code"]) > 6 and all(found["asked"].values())
    for name, code in found["code"].items():
        mnemonics = [
            next(word for word in line.split() if word[0] != "@") for line in code.splitlines() if line.strip()
        ]
        (let_in,) = (i for i, one in enumerate(mnemonics) if one.startswith("PREEXIT"))
        (waited,) = (i for i, one in enumerate(mnemonics) if one.startswith("ACQBULK"))
        touched = [
            i for i, one in enumerate(mnemonics) if one.startswith(MEMORY) and not one.startswith(("LDC", "LDL"))
        ]
        assert let_in < waited < min(touched), name
