"""Weights that a run starts from: torchvision's, timm's, a file's or another run's, with what their pixels meant.

What a run takes over of them (size, share of a photo, mean, deviation, stem) becomes options of its own, so that it
goes on without them.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import logging
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastres.data.dataset import first_line
from fastres.errors import FastresError
from fastres.models.registry import accepted_options, create_model
from fastres.train.checkpoint import FORMAT, load_checkpoint, read_tensors
from fastres.train.config import TrainConfig
from fastres.train.content import NETWORK, check_content
from fastres.train.identity import checksum
from fastres.train.layers import Frozen, head_name
from fastres.train.trained import center_share, evaluated_weights

TORCHVISION = "torchvision"
HUB_WEIGHTS, HUB_CONFIG, METADATA = "model.safetensors", "config.json", "fastres"
_WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "weights",
)  # where trainers put the weights in their checkpoints
_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
_COUNTED = "num_batches_tracked"


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a state_dict: the same weights have the same one in any file."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def seal(known: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """A checksum of weights and of what is known of them."""
    return checksum([dict(known), digest_of(tensors)])


@dataclass(frozen=True)
class Weights:
    """A network's weights and what is known of them.

    Attributes:
        source: what they are called in messages.
        tensors: the state_dict.
        model: the network's name here; None: it is not known.
        classes: of the logits; None: not known.
        mean, std: of the pixels, per channel, on the scale 0..1; None: not known.
        image_size: pixels a side; None: not known.
        center_share: part of a photo's shorter side that they were evaluated on; None: not known.
    """

    source: str
    tensors: dict[str, Tensor]
    model: str | None = None
    classes: tuple[str, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    image_size: int | None = None
    center_share: float | None = None

    @property
    def digest(self) -> str:
        """See `digest_of`."""
        return digest_of(self.tensors)


def read_weights(name: str, model: str) -> Weights:
    """Weights by what ``--weights`` says.

    Args:
        name: ``torchvision`` or ``torchvision:IMAGENET1K_V1``; a run folder or checkpoint; a file with a state_dict,
            ``.safetensors`` or what ``torch.save`` wrote; a folder in the Hugging Face Hub's layout; a name of timm's.
        model: the network that torchvision's are wanted of.

    Raises:
        FastresError: where there are none, or they cannot be read or downloaded.
    """
    files = [Path(name), *(Path(name) / file for file in ("best.pt", HUB_WEIGHTS, HUB_CONFIG))]
    stamps = [(file.stat().st_mtime_ns, file.stat().st_size) if file.exists() else None for file in files]
    return _read(name, model, tuple(stamps))


@lru_cache(maxsize=1)
def _read(name: str, model: str, _stamps: tuple[tuple[int, int] | None, ...]) -> Weights:
    kind, _, version = name.partition(":")
    if kind == TORCHVISION:
        return _torchvision(model, version)
    path = Path(name)
    if path.is_dir():
        return _hub_folder(path) if (path / HUB_WEIGHTS).is_file() else _run(path / "best.pt")
    if path.exists():
        return _file(path)
    if os.sep in name or path.suffix in (".pt", ".pth", ".safetensors"):
        raise FastresError(f"no weights at {name}: name a file, a run folder, torchvision or a network of timm's")
    return _timm(name)


def _torchvision(model: str, version: str) -> Weights:
    import torchvision

    if model not in torchvision.models.list_models(module=torchvision.models):
        here = [name for name in torchvision.models.list_models(module=torchvision.models) if name.startswith("resnet")]
        raise FastresError(f"torchvision has no weights of {model!r}: choose --model {', '.join(here)}")
    known = torchvision.models.get_model_weights(model)
    try:
        weights = torchvision.models.get_weight(f"{known.__name__}.{version}") if version else known.DEFAULT
    except (ValueError, AttributeError, KeyError):
        names = ", ".join(weights.name for weights in known)
        raise FastresError(f"torchvision has no weights {version!r} of {model}: choose from {names}") from None
    try:
        tensors = weights.get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
    except Exception as error:  # of the network, the disk or a file that is damaged
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise FastresError(
            f"cannot load {weights} ({first_line(error)}): put {weights.url} into {folder}, or name a file with "
            "--weights"
        ) from error
    preset = weights.transforms()
    return Weights(
        str(weights), tensors, model, tuple(weights.meta["categories"]), tuple(preset.mean), tuple(preset.std),
        preset.crop_size[0], min(1.0, preset.crop_size[0] / preset.resize_size[0]),
    )  # fmt: skip


def _timm(name: str) -> Weights:
    try:
        import timm
    except ImportError:
        raise FastresError(f"no weights at {name!r}, and for networks of timm's by name: pip install timm") from None
    network = name.removeprefix("timm:").removeprefix("timm/")
    if not timm.is_model(network):
        near = difflib.get_close_matches(network, timm.list_models("resnet*"), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise FastresError(f"no weights {name!r}: {hint}name torchvision, a file, a run folder or a network of timm's")
    chatter = logging.getLogger("huggingface_hub")  # of each of its tries
    level = chatter.level
    try:
        chatter.setLevel(logging.ERROR)
        model = timm.create_model(network, pretrained=True)
    except Exception as error:  # of the network, the disk or the file
        raise FastresError(
            f"cannot load {network} of timm's ({first_line(error)}): download it where there is a network, or name a "
            "file with --weights"
        ) from error
    finally:
        chatter.setLevel(level)
    return Weights(
        network, dict(model.state_dict()), network.split(".")[0], None, *_timm_pixels(cast(dict, model.pretrained_cfg))
    )


def _timm_pixels(config: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
    """Mean, deviation, size and share of a photo in the words of timm's configurations."""
    mean, std, size, share = (config.get(key) for key in ("mean", "std", "input_size", "crop_pct"))
    if config.get("crop_mode") == "border":  # the whole photo with a border, of which no square is a share
        share = None
    return tuple(mean) if mean else None, tuple(std) if std else None, size[-1] if size else None, share


def _hub_folder(path: Path) -> Weights:
    """A folder as timm and `fastres export` write it for the Hugging Face Hub."""
    try:
        tensors = _tensors(path / HUB_WEIGHTS)
        _metadata(path / HUB_WEIGHTS, tensors)
        return _described(str(path), tensors, json.loads((path / HUB_CONFIG).read_text("utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, FastresError):
            raise
        raise FastresError(
            f"{path / HUB_CONFIG} is no configuration of the Hub's layout ({first_line(error)})"
        ) from error


def _described(source: str, tensors: dict[str, Tensor], known: dict[str, Any]) -> Weights:
    """Weights with what a configuration in timm's words says of them."""
    names = known.get("label_names")
    classes = tuple(map(str, names)) if isinstance(names, list) else None
    return Weights(source, tensors, known["architecture"], classes, *_timm_pixels(known.get("pretrained_cfg") or {}))


def _file(path: Path) -> Weights:
    if path.suffix == ".safetensors":
        tensors = _tensors(path)
        known = _metadata(path, tensors)
        return _described(str(path), tensors, known) if known is not None else Weights(str(path), tensors)
    return _run(path) if _is_checkpoint(path) else Weights(str(path), _tensors(path))


def _metadata(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """What `fastres export` wrote beside the weights, if it wrote them; the format itself has no checksum."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(METADATA)
    if text is None:
        return None
    try:
        known = json.loads(text)
        if known.pop("sha256") != seal(known, tensors):
            raise ValueError("it is not what was written")
        return known
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise FastresError(f"{path} is damaged ({first_line(error)}): export it again") from error


def _is_checkpoint(path: Path) -> bool:
    try:
        return _saved(path).get("format") == FORMAT
    except FastresError:
        return False


def _is_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # one that is damaged: who reads it says so
        return True


def _saved(path: Path) -> dict[str, Any]:
    """What ``torch.save`` wrote, also before PyTorch 1.6, and with the options of torchvision's trainer."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        if _is_zip(path):
            return read_tensors(path)
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # what is no such file can raise anything
            raise FastresError(
                f"{path} is damaged or holds no tensors alone ({first_line(error)}): take another file"
            ) from error
    if not isinstance(content, dict):
        raise FastresError(f"{path} holds no state_dict: save one with torch.save")
    return content


def _run(path: Path) -> Weights:
    saved = load_checkpoint(path)
    check_content(saved, NETWORK, path, "no run can start from it")
    mean, std = (tuple(value / 255 for value in saved[name]) for name in ("mean", "std"))
    tensors, _ = evaluated_weights(saved)
    return Weights(
        str(path), dict(tensors), saved["model"], tuple(saved["classes"]), mean, std, saved["image_size"],
        center_share(saved, path),
    )  # fmt: skip


def _tensors(path: Path) -> dict[str, Tensor]:
    """The state_dict in a file, without what wraps it."""
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise FastresError(f"{path} needs the package safetensors: pip install safetensors") from None
        try:
            return load_file(path)
        except Exception as error:  # safetensors has types of its own
            raise FastresError(f"{path} is damaged or no safetensors file ({first_line(error)})") from error
    content = _saved(path)
    for wrapper in _WRAPPERS:
        if isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    for prefix in _PREFIXES:
        if content and all(isinstance(key, str) and key.startswith(prefix) for key in content):
            content = {key.removeprefix(prefix): value for key, value in content.items()}
    wrong = next((key for key, value in content.items() if not isinstance(value, Tensor)), None)
    if not content or wrong is not None:
        raise FastresError(
            f"{path} holds no state_dict{f' ({wrong!r} is no tensor)' if content else ''}: save one with torch.save"
        )
    return content


def settled(config: TrainConfig) -> TrainConfig:
    """The configuration with the weights' own size, share of a photo, mean, deviation and stem where it does not say
    others.

    Raises:
        FastresError: see `read_weights`.
    """
    if config.weights is None:
        return config
    weights = read_weights(config.weights, config.model)
    changes: dict[str, Any] = {}
    for name in ("image_size", "center_share"):
        if getattr(config, name) is None:
            changes[name] = getattr(weights, name)
    if config.mean is None and weights.mean is not None and weights.std is not None:
        changes |= {name: ",".join(f"{value:.8g}" for value in getattr(weights, name)) for name in ("mean", "std")}
    first = weights.tensors.get("conv1.weight")
    if config.stem == "auto" and first is not None and "stem" in accepted_options(config.model):
        changes["stem"] = "imagenet" if first.shape[-1] == 7 else "cifar"
    return config.replace(**changes)


def load_pretrained(model: nn.Module, weights: Weights, classes: tuple[str, ...], name: str) -> str:
    """Give a network the weights, all but the head where its classes are others, and tell in a line.

    Args:
        classes: of the network.
        name: of the network.

    Raises:
        FastresError: where the weights are of another network, or not finite.
    """
    own, given, head = model.state_dict(), dict(weights.tensors), head_name(model)
    of_head = [key for key in own if key.startswith(f"{head}.")]
    rows = _rows(weights, classes)
    kept = rows is not None and all(key in given and given[key].shape == own[key].shape for key in of_head)
    if kept and rows is not None:
        given |= {key: given[key][rows] for key in of_head}
    else:
        count = len(given[f"{head}.weight"]) if f"{head}.weight" in given else None
        given |= {key: own[key] for key in of_head}
    _check_fit(own, given, weights, name)
    if wrong := next(
        (key for key, value in given.items() if value.is_floating_point() and not value.isfinite().all()), None
    ):
        raise FastresError(f"the weights of {weights.source} are not finite in {wrong!r}: take others")
    with torch.no_grad():
        for key in own.keys() & given.keys():
            own[key].copy_(given[key])  # in the network's own dtype
    if kept:
        return f"weights of {weights.source}, with their head for the same {len(classes)} classes"
    theirs = "" if count is None else f" in place of {count}"
    return f"weights of {weights.source}, but for the head {head}, which is new: {len(classes)} classes{theirs}"


def check_fit(config: TrainConfig) -> None:
    """Refuse weights and parts that are no fit for the network, before its data is read.

    Raises:
        FastresError: see `load_pretrained` and `fastres.train.layers.Frozen`.
    """
    if config.weights is None and config.freeze is None:
        return
    options: dict[str, Any] = {} if config.stem == "auto" else {"stem": config.stem}
    with torch.device("meta"):
        model = create_model(config.model, **options)
    Frozen(model, config.freeze)
    if config.weights is not None:
        weights, own, head = read_weights(config.weights, config.model), model.state_dict(), head_name(model)
        of_head = {key: value for key, value in own.items() if key.startswith(f"{head}.")}
        _check_fit(own, {**weights.tensors, **of_head}, weights, config.model)


def _check_fit(own: Mapping[str, Tensor], given: Mapping[str, Tensor], weights: Weights, name: str) -> None:
    for key in [*own, *given]:
        if key.endswith(_COUNTED):  # old files have none
            continue
        if key not in given or key not in own:
            what = "is missing in them" if key not in given else "is unknown to it"
        elif given[key].shape != own[key].shape:
            what = f"has shape {tuple(given[key].shape)}, not {tuple(own[key].shape)}"
        else:
            continue
        named = f": they are of {weights.model}" if weights.model not in (None, name) else ""
        raise FastresError(
            f"the weights of {weights.source} do not fit --model {name} ({key!r} {what}){named}; name theirs"
        )


def _rows(weights: Weights, classes: tuple[str, ...]) -> Tensor | None:
    """The rows of the weights' head for the classes; None: they are others.

    Of weights whose classes have no names, as many classes are taken to be the same.
    """
    if weights.classes is None:
        return torch.arange(len(classes))
    if sorted(weights.classes) != sorted(classes):
        return None
    return torch.tensor([weights.classes.index(name) for name in classes])
