"""Each example trains, with fused blocks, and its losses are those that it has without them."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from fastres.nn.blocks import FusedBlock

EXAMPLES = Path(__file__).parent.parent / "examples"
NEEDS = {
    "plain_loop": "torchvision",
    "with_timm": "timm",
    "with_lightning": "lightning",
    "with_accelerate": "accelerate",
}


@pytest.fixture
def example(request, monkeypatch):
    """The script's module."""
    pytest.importorskip(NEEDS[request.param])
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(os, "environ", {**os.environ})  # accelerate and Lightning set variables
    spec = importlib.util.spec_from_file_location(request.param, EXAMPLES / f"{request.param}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("example", NEEDS, indirect=True)
def test_an_example_trains(example, monkeypatch):
    fused = []

    def fuse(model):
        fused.append(original(model))
        return model

    original = example.fuse
    monkeypatch.setattr(example, "fuse", fuse)
    ours = example.main(images=24, batch=8)
    assert any(isinstance(module, FusedBlock) for module in fused[0].modules())
    monkeypatch.setattr(example, "fuse", lambda model: model)
    monkeypatch.setattr(example, "fold", lambda model: model, raising=False)
    theirs = example.main(images=24, batch=8)
    assert len(ours) == 3
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=0.1, atol=0.1)


def test_every_example_is_tried_and_listed():
    scripts = {path.stem for path in EXAMPLES.glob("*.py")} - {"shapes"}
    callbacks = {name for name in scripts if name.startswith("log_to_")}  # tests/train/test_callbacks.py tries them
    assert scripts - callbacks == NEEDS.keys()
    assert all(f"[{name}.py]({name}.py)" in (EXAMPLES / "README.md").read_text() for name in scripts)
