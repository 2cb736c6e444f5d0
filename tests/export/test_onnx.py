"""ONNX files: what onnxruntime computes from them is what the network computes, for any batch."""

import pytest
import torch
from support_nets import SMALL, perturbed

import fastres.export.formats
from fastres.errors import FastresError
from fastres.export import FromPixels, check_onnx, portable, to_onnx


@pytest.mark.parametrize("name", ["cifar", "notebook", "preact", "torchvision"])
def test_onnxruntime_computes_the_eager_networks_logits(name):
    onnx = pytest.importorskip("onnx")
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    model = perturbed(SMALL[name]()).eval()
    network = FromPixels(portable(model), [110.0] * 3, [60.0] * 3)
    content = to_onnx(network, 24, {"classes": "[1]"})
    pixels = torch.randint(0, 256, (5, 3, 24, 24)).float()
    for batch in (1, 2, 5):
        assert check_onnx(content, lambda x: model((x - 110) / 60), pixels[:batch]) < 2e-6
    with torch.no_grad():
        model.fc.bias[0] += 0.01
    assert check_onnx(content, lambda x: model((x - 110) / 60), pixels) > 1e-3
    loaded = onnx.load_from_string(content)
    onnx.checker.check_model(loaded)
    assert {node.domain for node in loaded.graph.node} == {""}
    kinds = {node.op_type for node in loaded.graph.node}
    assert "Transpose" not in kinds and ("BatchNormalization" in kinds) == (name == "preact")
    batch, *rest = loaded.graph.input[0].type.tensor_type.shape.dim
    assert batch.dim_param == "batch" and [dim.dim_value for dim in rest] == [3, 24, 24]
    assert [(entry.key, entry.value) for entry in loaded.metadata_props] == [("classes", "[1]")]


def test_without_onnx_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(fastres.export.formats, "find_spec", lambda name: None)
    with pytest.raises(FastresError, match="needs the package onnx: pip install 'fastres.export.'"):
        to_onnx(portable(SMALL["basic"]()), 16)
