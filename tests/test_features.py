"""Cells of docs/features.md, held against this package and against the versions of timm and Lightning that it names."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

from fastres.arguments import EXPORTS
from fastres.train.config import TrainConfig

PAGE = (Path(__file__).parent.parent / "docs" / "features.md").read_text()
OPTIONS = {name: field.metadata for name, field in TrainConfig.__dataclass_fields__.items()}


def table() -> dict[str, dict[str, str]]:
    """Cells by row and column."""
    lines = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in re.findall(r"^\|.*\|$", PAGE, re.M)]
    (_, *columns), _, *rows = lines
    assert all(len(row) == len(columns) + 1 for row in rows)
    return {row[0]: dict(zip(columns, row[1:], strict=True)) for row in rows}


TABLE = table()


def library(name):
    """A library, in the version that the page is of."""
    found = pytest.importorskip(name)
    named = re.search(rf"{name} ([\d.]+\d)", PAGE, re.I)[1]
    if found.__version__ != named:
        pytest.skip(f"the page is of {name} {named}, not {found.__version__}")
    return found


def test_cells_of_this_package():
    def of(row):
        return TABLE[row]["fastres"]

    assert set(of("optimizers").lower().split(", ")) == set(OPTIONS["optimizer"]["choices"])
    named = [name.strip() for name in next(row for row in TABLE if row.startswith("AutoAugment")).split(",")]
    numbers = [int(number) - 1 for number in re.findall(r"\d", of(", ".join(named)))]
    offered = {f"{choice}augment" for choice in OPTIONS["auto_augment"]["choices"]} - {"noneaugment"}
    assert {named[number].lower() for number in numbers} == offered
    for word, suffix in (
        ("ONNX", ".onnx"),
        ("torch.export", ".pt2"),
        ("torchvision", ".pt"),
        ("safetensors", ".safetensors"),
    ):
        assert word in of("formats") and suffix in EXPORTS
    assert ("Hub" in of("formats")) == ("" in EXPORTS)
    for row, option in {
        "learning-rate test": "lr_find", "flat `CLASS/*`": "val_share", "early stopping": "patience",
        "weights' average": "ema", "class weights": "class_weights", "balanced sampling": "sampling",
        "random resized crop, jitter, erasing": "crop_scale", "MixUp and CutMix with soft labels": "cutmix",
    }.items():  # fmt: skip
        flag = f"--{option.replace('_', '-')}"
        assert of(row) == "yes" or flag in of(row), row
        assert option in OPTIONS or option == "lr_find"


def test_cells_of_timm():
    timm = library("timm")
    from timm import data, loss, optim, utils
    from timm.data import auto_augment, readers

    def of(row):
        return TABLE[row]["timm"]

    sources = "".join(path.read_text() for path in Path(data.__file__).parent.rglob("*.py"))
    assert (of("EXIF orientation") == "no") == ("exif" not in sources.lower())
    suffixes = re.findall(r"\.\w+", of("suffixes"))
    assert suffixes == list(data.readers.img_extensions.IMG_EXTENSIONS) and hasattr(
        readers.img_extensions, "add_img_extensions"
    )
    factory = inspect.getsource(readers.reader_factory.create_reader)
    assert all(prefix in factory for prefix in ("hfds", "tfds", "wds", ".tar")) and ".zip" not in factory
    assert "csv" not in factory and (of("CSV of file and label"), of("zip and tar")) == ("no", "tar")
    dataset = inspect.getmodule(data.ImageDataset)
    assert dataset._ERROR_RETRY == 10 and "ten in a row" in of("unreadable files")
    names = "auto_augment_transform rand_augment_transform augment_and_mix_transform".split()
    assert all(hasattr(auto_augment, name) for name in names) and "trivial" not in sources.lower()
    assert hasattr(data.distributed_sampler, "RepeatAugSampler") and of("repeated augmentation") == "yes"
    assert hasattr(loss, "CLASS_WEIGHT_METHODS") and of("class weights") == "yes"
    assert "WeightedRandomSampler" not in sources and of("balanced sampling") == "no"
    assert len(optim.list_optimizers()) > 24 and of("optimizers") == "dozens"
    assert hasattr(utils, "ModelEmaV3") and hasattr(utils, "freeze") and of("weights' average") == "yes"
    assert "layer_decay" in inspect.signature(optim.create_optimizer_v2).parameters
    assert len(timm.list_models(pretrained=True)) > 1000
    assert importlib.import_module("timm.utils.onnx").onnx_export and hasattr(timm.models, "push_to_hf_hub")
    assert of("formats") == "ONNX, Hub"


def test_cells_of_lightning():
    library("lightning")
    from lightning.pytorch import LightningModule, Trainer, callbacks, loggers, strategies
    from lightning.pytorch.tuner import Tuner

    def of(row):
        return TABLE[row]["Lightning"]

    exports = {name for name in vars(LightningModule) if name.startswith("to_")} - {"to_fp16"}
    assert {f"to_{name.lower()}" for name in re.findall(r"\w+(?=,| \(|$)", of("formats"))} - {
        "to_deprecated"
    } == exports
    assert "deprecated" in LightningModule.to_torchscript.__doc__
    for name in of("on several GPUs").split(", "):
        assert hasattr(strategies, f"{name if name.isupper() else 'DeepSpeed'}Strategy")
    assert hasattr(Tuner, "lr_find") and of("learning-rate test") == "yes"
    assert hasattr(callbacks, "EMAWeightAveraging") and of("weights' average") == "yes"
    assert hasattr(callbacks, "EarlyStopping") and of("early stopping") == "yes"
    assert hasattr(callbacks, "BackboneFinetuning") and "callback for freezing" in of("freezing, rates by layer")
    assert all(hasattr(loggers, f"{name}Logger") for name in ("TensorBoard", "Wandb", "MLFlow"))
    assert of("TensorBoard, W&B, MLflow") == "all" and hasattr(Trainer, "test")
