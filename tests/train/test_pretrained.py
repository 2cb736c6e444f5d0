"""Runs that start from weights, by the real loading code of each source, from files that are made here."""

import argparse
import io
import json
import shutil

import pytest
import torch
import torchvision
from support_data import write_batches, write_image_folder
from support_train import CLASSES, tiny_config, tiny_dataset, tiny_trainer

from fastres import data
from fastres.cli import main
from fastres.errors import FastresError
from fastres.train import Trainer
from fastres.train.checkpoint import load_checkpoint
from fastres.train.pretrained import load_pretrained, read_weights, settled
from fastres.train.run_folder import RunFolder, read_config, saved_config
from fastres.train.trained import load_trained

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def theirs(classes: int = 1000, seed: int = 5) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = torchvision.models.resnet18(num_classes=classes)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_()
    return model


def started(folder, **changes) -> tuple[Trainer, list[str]]:
    """A trainer that has not trained yet, and what it said."""
    said: list[str] = []
    config = tiny_config(**{"model": "resnet18", **changes})
    run = Trainer(settled(config).replace(image_size=None), tiny_dataset(), RunFolder(folder), say=said.append)
    run.folder.close()
    return run, said


def same(run: Trainer, state: dict, but: str = "fc.") -> bool:
    own = run.model.state_dict()
    return all(
        torch.equal(own[key], state[key].float()) for key in own if not key.startswith(but) and "num_b" not in key
    )


@pytest.fixture
def torch_home(tmp_path, monkeypatch):
    """torchvision's weights where it keeps what it has downloaded."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints"


def test_torchvision(tmp_path, torch_home):
    kept = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    state = theirs().state_dict()
    torch.save(state, torch_home / kept.url.rsplit("/", 1)[1])
    for name in ("torchvision", "torchvision:IMAGENET1K_V1"):
        config = settled(tiny_config(model="resnet18", weights=name))
        assert (config.image_size, config.center_share, config.stem) == (224, 224 / 256, "imagenet")
        assert settled(config.replace(center_share=0.5)).center_share == 0.5
        assert (config.mean, config.std) == ("0.485,0.456,0.406", "0.229,0.224,0.225")
        run, said = started(tmp_path / name, weights=name)
        assert same(run, state) and run.model.fc.weight.shape == (3, 512)
        assert "all" not in said[0] and "but for the head fc, which is new: 3 classes in place of 1000" in said[0]
        assert run.dataset.mean == pytest.approx([255 * m for m in IMAGENET[0]], rel=1e-6)
        assert run.dataset.digest == tiny_dataset().digest
    for name, model, words in (
        ("torchvision:V9", "resnet18", "no weights 'V9' of resnet18: choose from IMAGENET1K_V1"),
        ("torchvision", "resnet20", "torchvision has no weights of 'resnet20': choose --model resnet"),
    ):
        with pytest.raises(FastresError, match=words):
            read_weights(name, model)


def test_torchvision_without_a_network(torch_home, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>\nmore")

    monkeypatch.setattr("torch.hub.download_url_to_file", fail)
    with pytest.raises(FastresError) as stopped:
        read_weights("torchvision", "resnet34")
    text = str(stopped.value)
    assert "cannot load ResNet34_Weights.IMAGENET1K_V1 (<urlopen error" in text and f"into {torch_home}" in text
    assert "\n" not in text and "resnet34-b627a593.pth" in text


def test_a_network_of_timms_from_its_cache(tmp_path, monkeypatch):
    """As the Hugging Face Hub's client keeps it: nothing of timm is replaced."""
    timm = pytest.importorskip("timm")
    safetensors = pytest.importorskip("safetensors.torch")
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    torch.manual_seed(3)
    state = timm.create_model("resnet18").state_dict()
    entry = tmp_path / "models--timm--resnet18.a1_in1k"
    (entry / "snapshots" / "abc").mkdir(parents=True)
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text("abc")
    safetensors.save_file(state, entry / "snapshots" / "abc" / "model.safetensors")
    found = read_weights("resnet18.a1_in1k", "resnet20")
    assert (found.model, found.mean, found.std, found.image_size) == ("resnet18", *IMAGENET, 224)
    known = timm.get_pretrained_cfg("resnet18.a1_in1k")
    assert found.center_share == known.crop_pct and known.crop_mode == "center"
    run, _ = started(tmp_path / "run", weights="resnet18.a1_in1k")
    assert same(run, state)
    with pytest.raises(
        FastresError, match=r"cannot load resnet34.a1_in1k of timm's \(.*\): download it where there is a netw"
    ):
        read_weights("resnet34.a1_in1k", "resnet34")
    with pytest.raises(FastresError, match="no weights 'resnet1800': did you mean resnet"):
        read_weights("resnet1800", "resnet18")


def saved(path, state, form):
    if form == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, path)
    elif form == "legacy":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    elif form == "wrapped":  # as torchvision's and timm's trainers and DistributedDataParallel write it
        content = {f"module.{key}": value for key, value in state.items()}
        torch.save({"model": content, "args": argparse.Namespace(lr=0.1), "epoch": 3}, path)
    else:
        torch.save({key: value.half() if value.is_floating_point() else value for key, value in state.items()}, path)


@pytest.mark.parametrize("form", ["half", "legacy", "wrapped", "safetensors"])
def test_files(tmp_path, form):
    state = theirs(3).state_dict()
    state = {key: value for key, value in state.items() if "num_batches" not in key}  # which old files do not have
    path = tmp_path / f"w.{'safetensors' if form == 'safetensors' else 'pth'}"
    saved(path, state, form)
    run, said = started(tmp_path / "run", weights=str(path))
    halves = {key: value.half() for key, value in state.items()}
    assert same(run, halves if form == "half" else state, but="no such") and "with their head for the same 3" in said[0]
    assert run.config.mean is None and run.dataset.mean == tiny_dataset().mean  # a file alone does not tell
    run, _ = started(tmp_path / "own", weights=str(path), mean="0.5,0.5,0.5", std="0.2,0.2,0.2")
    assert run.dataset.std == pytest.approx((51, 51, 51)) and run.weights == read_weights(str(path), "").digest


def test_another_runs_weights(tmp_path):
    first = tiny_trainer(tmp_path / "first", model="resnet8", ema=0.5)
    first.fit()
    first.folder.close()
    best = load_checkpoint(tmp_path / "first" / "best.pt")["weights"]
    for place in ("first", "first/best.pt"):
        run, said = started(
            tmp_path / f"from-{place}".replace("/", "-"), model="resnet8", weights=str(tmp_path / place)
        )
        assert same(run, best, but="no such") and "with their head for the same 3 classes" in said[0]
        assert run.dataset.mean == pytest.approx(tiny_dataset().mean)
    weights = read_weights(str(tmp_path / "first"), "")
    turned = load_pretrained(run.model, weights, CLASSES[::-1], "resnet8")
    assert "same 3" in turned and torch.equal(run.model.fc.weight, best["fc.weight"].flip(0))
    fresh = run.model.fc.weight.clone()
    assert "which is new: 3 classes in place of 3" in load_pretrained(run.model, weights, ("a", "b", "c"), "resnet8")
    assert torch.equal(run.model.fc.weight, fresh)


def broken(state, how):
    return {
        "nan": {**state, "layer1.0.conv1.weight": state["layer1.0.conv1.weight"] * float("nan")},
        "more": {**state, "layer9.weight": torch.ones(2)},
        "less": {key: value for key, value in state.items() if key != "bn1.weight"},
        "shape": {**state, "bn1.weight": torch.ones(3)},
        "nest": {"a": {"b": 1}},
        "empty": {},
    }[how]


@pytest.mark.parametrize(
    "how, words",
    [
        ("nan", "are not finite in 'layer1.0.conv1.weight': take others"),
        ("more", r"do not fit --model resnet18 \('layer9.weight' is unknown to it\)"),
        ("less", r"do not fit --model resnet18 \('bn1.weight' is missing in them\)"),
        ("shape", r"'bn1.weight' has shape \(3,\), not \(64,\)"),
        ("nest", r"holds no state_dict \('a' is no tensor\)"),
        ("empty", "holds no state_dict"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, how, words):
    torch.save(broken(theirs(3).state_dict(), how), tmp_path / "w.pth")
    with pytest.raises(FastresError, match=words):
        started(tmp_path / "run", weights=str(tmp_path / "w.pth"))


class Evil:
    def __reduce__(self):
        return (print, ("run",))


def test_files_that_are_no_weights(tmp_path, capsys):
    whole = io.BytesIO()
    torch.save({"a": torch.ones(99)}, whole)
    (tmp_path / "cut.pth").write_bytes(whole.getvalue()[:-50])
    many = bytearray(whole.getvalue())
    many[many.rindex(b"PK\x06\x07") + 16] = 3  # disks of an archive
    (tmp_path / "disks.pth").write_bytes(many)
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    torch.save(Evil(), tmp_path / "evil.pth")
    torch.save(Evil(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save([1], tmp_path / "list.pth")
    for name in ("cut.pth", "disks.pth", "cut.safetensors", "evil.pth", "old.pth", "list.pth", "none.pth", "a/b"):
        with pytest.raises(FastresError) as stopped:
            read_weights(str(tmp_path / name), "resnet18")
        assert "\n" not in str(stopped.value) and str(tmp_path) in str(stopped.value)
    assert "run" not in capsys.readouterr().out


def fine_tune(tmp_path, *more):
    return [
        "train", "--data", str(tmp_path / "photos"), "--weights", str(tmp_path / "first"), "--epochs", "1",
        "--batch-size", "4", "--device", "cpu", "--precision", "fp32", "--backend", "eager",
        "--out", str(tmp_path / "run"), *more,
    ]  # fmt: skip


def test_the_command_takes_network_size_and_pixels_from_a_run_and_goes_on_without_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FASTRES_CACHE", str(tmp_path / "cache"))
    first = tiny_trainer(tmp_path / "first", model="resnet20", steps=2)
    first.fit()
    first.folder.close()
    write_image_folder(tmp_path / "photos", train=6, test=4, size=(40, 30))
    assert main(fine_tune(tmp_path, "--freeze", "backbone")) == 0
    out = capsys.readouterr().out
    assert "taken at 12x12" in out and "but for the head fc, which is new: 2 classes in place of 3" in out
    facts, kept = read_config(tmp_path / "run"), saved_config(tmp_path / "run")
    assert (kept.model, kept.image_size) == ("resnet20", 12)
    assert facts["initial"] == load_checkpoint(tmp_path / "run" / "last.pt")["initial"] is not None
    last = load_checkpoint(tmp_path / "run" / "last.pt")
    best = load_checkpoint(tmp_path / "first" / "best.pt")["weights"]
    assert all(torch.equal(last["weights"][key], best[key]) for key in best if not key.startswith("fc."))
    assert last["mean"] == pytest.approx(tiny_dataset().mean)
    shutil.rmtree(tmp_path / "first")
    assert main(["train", "--resume", str(tmp_path / "run"), "--epochs", "3"]) == 0
    assert "going on to step 9 with the schedule of a run of that length" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 6, 9] and rows[1]["lr"] > 0
    assert load_checkpoint(tmp_path / "run" / "last.pt")["initial"] == facts["initial"]
    assert main(["train", "--resume", str(tmp_path / "run"), "--epochs", "2"]) == 2
    assert "has 9 steps already, more than the 6 that are asked for" in capsys.readouterr().err
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0 and saved_config(tmp_path / "run").epochs == 3


def test_the_command_takes_the_weights_share_of_a_photo(tmp_path, monkeypatch, capsys):
    """Unless another one is given; images that are no photos in files are seen whole."""
    monkeypatch.setenv("FASTRES_CACHE", str(tmp_path / "cache"))
    write_image_folder(tmp_path / "photos", train=6, test=4, size=(40, 30))
    write_batches(tmp_path / "batches")
    quick = "--epochs 1 --batch-size 4 --device cpu --precision fp32 --backend eager".split()

    def kept(name, *more):
        assert main(["train", *quick, "--out", str(tmp_path / name), *more]) == 0
        saved = load_checkpoint(tmp_path / name / "best.pt")
        trained = load_trained(tmp_path / name / "best.pt", torch.device("cpu"))
        return saved["options"]["center_share"], trained.center_share, saved["stored_size"]

    photos, first = ["--data", str(tmp_path / "photos")], ["--weights", str(tmp_path / "first")]
    assert kept("first", *photos, "--model", "resnet8", "--center-share", "0.6") == (0.6, 0.6, 18)
    assert kept("second", *photos, *first) == (0.6, 0.6, 18)
    assert kept("other", *photos, *first, "--center-share", "0.5") == (0.5, 0.5, 15)
    assert kept("batches-run", "--data", str(tmp_path / "batches"), *first) == (0.6, 1.0, 32)
    assert main(["train", "--resume", str(tmp_path / "batches-run"), "--epochs", "2"]) == 0
    loaded = data.load(tmp_path / "photos", image_size=30, center_share=0.5)
    with pytest.raises(
        data.DataError, match="share of 0.5 of each photo, but --center-share is 0.6: load it with cent"
    ):
        Trainer(tiny_config(model="resnet8", weights=first[1]), loaded, RunFolder(tmp_path / "api"))


def test_what_does_not_fit_is_known_before_the_data_is_read(tmp_path, capsys):
    torch.save(theirs(3).state_dict(), tmp_path / "w.pth")
    argv = ["train", "--data", str(tmp_path / "none"), "--model", "resnet34", "--device", "cpu"]
    for more, words in (
        (["--weights", str(tmp_path / "w.pth")], "do not fit --model resnet34 ('layer1.2.conv1.weight' is missing"),
        (["--freeze", "layer9"], "'layer9' is no part of the network"),
    ):
        assert main([*argv, *more]) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1


def test_a_restarted_launch_refuses_other_weights_under_the_same_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FASTRES_CACHE", str(tmp_path / "cache"))
    write_image_folder(tmp_path / "photos", train=6, test=4)
    first = tiny_trainer(tmp_path / "first", model="resnet8", steps=2)
    first.fit()
    first.folder.close()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert main(fine_tune(tmp_path)) == 0
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert main(fine_tune(tmp_path)) == 0
    shutil.rmtree(tmp_path / "first")
    tiny_trainer(tmp_path / "first", model="resnet8", steps=2, seed=8).fit()
    for _ in range(2):
        assert main(fine_tune(tmp_path)) == 2
        assert "started from other weights than" in capsys.readouterr().err
