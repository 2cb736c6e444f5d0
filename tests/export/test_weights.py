"""Weights alone: each form read back by the library that it is for."""

import json

import pytest
import torch
import torchvision
from support_nets import perturbed
from support_train import tiny_trainer

from fastres.cli import main
from fastres.export.weights import differs_from_torchvision, facts, write_hub
from fastres.models import create_model
from fastres.train.checkpoint import load_checkpoint
from fastres.train.pretrained import load_pretrained, read_weights
from fastres.train.trained import load_trained


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """ResNet-18 with the CIFAR stem on images of 12 pixels."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    trainer = tiny_trainer(folder, model="resnet18", steps=1)
    trainer.fit()
    trainer.folder.close()
    return folder


def test_safetensors(run, tmp_path, capsys):
    load_file = pytest.importorskip("safetensors.torch").load_file
    path = tmp_path / "w.safetensors"
    assert main(["export", str(run), "--out", str(path)]) == 0
    best = load_checkpoint(run / "best.pt")
    found = load_file(path)
    assert all(torch.equal(found[name], value) for name, value in best["weights"].items())
    weights = read_weights(str(path), "")
    assert (weights.model, weights.image_size, list(weights.classes)) == ("resnet18", 12, best["classes"])
    assert [255 * value for value in weights.mean] == pytest.approx(best["mean"])
    model = create_model("resnet18", num_classes=3, stem="cifar")
    assert "same 3 classes" in load_pretrained(model, weights, tuple(best["classes"]), "resnet18")


@pytest.mark.parametrize("change", ["weight", "fact"])
def test_safetensors_that_were_changed(run, tmp_path, change):
    pytest.importorskip("safetensors")
    path = tmp_path / "w.safetensors"
    assert main(["export", str(run), "--out", str(path)]) == 0
    raw = path.read_bytes()
    path.write_bytes(
        raw[:-9] + b"\x01" + raw[-8:] if change == "weight" else raw.replace(b"architecture", b"brchitecture")
    )
    with pytest.raises(ValueError, match=r"w.safetensors is damaged \(it is not what was written\): export it again"):
        read_weights(str(path), "")


def test_a_hub_folder_for_fastres(run, tmp_path, capsys):
    pytest.importorskip("safetensors")
    for _ in range(2):  # its own files are written again
        assert main(["export", str(run), "--out", str(tmp_path / "hub")]) == 0
    assert "for fastres" in capsys.readouterr().out
    assert read_weights(str(tmp_path / "hub"), "").digest == read_weights(str(run), "").digest
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert (
        config["model_options"] == {"stem": "cifar"}
        and "library_name: fastres" in (tmp_path / "hub" / "README.md").read_text()
    )
    (tmp_path / "hub" / "notes.txt").write_text("mine")
    assert main(["export", str(run), "--out", str(tmp_path / "hub")]) == 2
    assert "holds 'notes.txt', which is no export's" in capsys.readouterr().err


def test_a_hub_folder_that_timm_reads(tmp_path, run):
    timm = pytest.importorskip("timm")
    pytest.importorskip("safetensors")
    model = perturbed(create_model("resnet18", num_classes=3, stem="imagenet")).eval()
    known = facts(load_trained(run / "best.pt", torch.device("cpu")), "resnet18", {"stem": "imagenet"})
    assert write_hub(tmp_path / "hub", model.state_dict(), known, "drawn\nshapes") == "timm"
    theirs = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), model(x), rtol=1e-5, atol=1e-5)
    config = timm.data.resolve_data_config({}, model=theirs)
    assert tuple(config["input_size"]) == (3, 12, 12) and config["mean"] == pytest.approx([110 / 255] * 3)
    weights = read_weights(str(tmp_path / "hub"), "")
    assert weights.model == "resnet18" and weights.classes == tuple(known["label_names"])


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("resnet18", {"stem": "imagenet"}, None),
        ("resnet50", {"stem": "cifar"}, "'conv1.weight' has shape (64, 3, 3, 3), not (64, 3, 7, 7)"),
        ("resnet20", {}, "it has no resnet20"),
        ("resnet34", {"stem": "imagenet", "residual": False}, "'layer2.0.downsample.0.weight' is missing"),
    ],
)
def test_what_torchvision_can_load(name, options, words):
    weights = create_model(name, num_classes=4, **options).state_dict()
    assert differs_from_torchvision(name, weights, 4) == words
    if words is None:
        torchvision.models.get_model(name, num_classes=4).load_state_dict(weights)


def test_weights_that_torchvision_cannot_load_are_not_written(run, tmp_path, capsys):
    assert main(["export", str(run), "--out", str(tmp_path / "w.pt")]) == 2
    err = capsys.readouterr().err
    assert "torchvision cannot load the weights" in err and "export to .safetensors" in err and err.count("\n") == 1
    assert not (tmp_path / "w.pt").exists()


def test_without_safetensors_the_remedy_is_named(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    for out in ("w.safetensors", "hub"):
        assert main(["export", str(run), "--out", str(tmp_path / out)]) == 2
        assert "safetensors is not installed: pip install 'fastres[export]'" in capsys.readouterr().err
        assert not (tmp_path / out).exists()
