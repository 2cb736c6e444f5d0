"""`fastres export`, from a run folder to what other programs load."""

import json

import pytest
import torch
import torchvision
from support_nets import perturbed
from support_train import tiny_config, tiny_dataset

from fastres import data
from fastres.cli import main
from fastres.export import command
from fastres.models import create_model
from fastres.train import Trainer
from fastres.train.checkpoint import load_checkpoint, save_checkpoint
from fastres.train.run_folder import RunFolder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of ResNet-8."""
    folder = tmp_path_factory.mktemp("run")
    Trainer(tiny_config(model="resnet8", epochs=1), tiny_dataset(), RunFolder(folder), say=lambda line: None).fit()
    return folder


def logits(run, pixels):
    """What the run's network says, in eager PyTorch."""
    saved = load_checkpoint(run / "best.pt")
    model = create_model(saved["model"], num_classes=3, **saved["model_options"]).eval()
    model.load_state_dict(saved["weights"])
    with torch.no_grad():
        return model(data.normalise(pixels, saved["mean"], saved["std"]))


def test_onnx(run, tmp_path, capsys):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    onnxruntime = pytest.importorskip("onnxruntime")
    assert main(["export", str(run), "--out", str(tmp_path / "model.onnx")]) == 0
    said = capsys.readouterr().out
    assert "to logits of 3 classes; onnxruntime's are within" in said and said.count("\n") == 1
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    pixels = torch.randint(0, 256, (4, 3, 12, 12)).float()
    (got,) = session.run(None, {"images": pixels.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), logits(run, pixels), rtol=1e-4, atol=1e-5)
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["classes"]) == list(tiny_dataset().classes) and facts["image_size"] == "12"


def test_an_onnx_file_that_computes_something_else_is_not_written(run, tmp_path, capsys, monkeypatch):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    monkeypatch.setattr(command, "check_onnx", lambda *_: float("nan"))
    assert main(["export", str(run), "--out", str(tmp_path / "model.onnx")]) == 2
    assert "nothing was written" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_program(run, tmp_path):
    path = tmp_path / "model.pt2"
    assert main(["export", str(run), "--out", str(path)]) == 0
    facts = {"classes": "", "input": ""}
    module = torch.export.load(path, extra_files=facts).module()
    pixels = torch.randint(0, 256, (4, 3, 12, 12)).float()
    torch.testing.assert_close(module(pixels), logits(run, pixels), rtol=1e-4, atol=1e-5)
    assert json.loads(facts["classes"]) == list(tiny_dataset().classes)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_saved_model_loads_in_plain_torchvision(name, tmp_path):
    model = perturbed(create_model(name, num_classes=3, stem="imagenet")).eval()
    save_checkpoint(
        tmp_path / "best.pt",
        dict(
            model=name,
            model_options={"stem": "imagenet"},
            weights=model.state_dict(),
            options={},
            classes=["a", "b", "c"],
            mean=[0.0] * 3,
            std=[1.0] * 3,
            image_size=64,
            data="none",
            epoch=1,
        ),
    )
    assert main(["export", str(tmp_path / "best.pt"), "--out", str(tmp_path / "weights.pt")]) == 0
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        for weights in (
            load_checkpoint(tmp_path / "best.pt")["weights"],
            torch.load(tmp_path / "weights.pt", weights_only=True),
        ):
            theirs = getattr(torchvision.models, name)(num_classes=3)
            theirs.load_state_dict(weights)
            assert torch.equal(theirs.eval()(x), expected)


@pytest.mark.parametrize(
    "out, words",
    [
        ("model.tflite", "model.tflite has none of the endings .onnx, .pt2, .pt"),
        ("no/such/model.pt", "model.pt: No such file or directory; choose another --out"),
    ],
)
def test_faults_are_one_line(run, out, words, tmp_path, capsys):
    assert main(["export", str(run), "--out", str(tmp_path / out)]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1
