"""Weights alone: for torchvision, as safetensors, and in the layout of the Hugging Face Hub, which timm reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor

from fastres.atomic import atomic_write
from fastres.errors import FastresError
from fastres.export.formats import write_bytes
from fastres.train.pretrained import HUB_CONFIG, HUB_WEIGHTS, METADATA, seal
from fastres.train.trained import Trained

HUB_FILES = HUB_WEIGHTS, HUB_CONFIG, "README.md"


def differs_from_torchvision(name: str, weights: Mapping[str, Tensor], classes: int) -> str | None:
    """In a few words why torchvision's network of that name cannot load the weights; None: it can."""
    if name not in torchvision.models.list_models(module=torchvision.models):
        return f"it has no {name}"
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name, weights=None, num_classes=classes).state_dict()
    for key in [*theirs, *weights]:
        if key not in weights or key not in theirs:
            return f"{key!r} is {'missing' if key not in weights else 'unknown to it'}"
        if theirs[key].shape != weights[key].shape:
            return f"{key!r} has shape {tuple(weights[key].shape)}, not {tuple(theirs[key].shape)}"
    return None


def facts(trained: Trained, model: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a network beside its weights, as plain values."""
    return {
        "architecture": model,
        "num_classes": len(trained.classes),
        "label_names": list(trained.classes),
        "model_options": dict(options),
        "pretrained_cfg": {
            "input_size": [3, trained.image_size, trained.image_size],
            "mean": [value / 255 for value in trained.mean],
            "std": [value / 255 for value in trained.std],
            "num_classes": len(trained.classes),
            "crop_pct": trained.center_share,
            "crop_mode": "center",
            "interpolation": "bilinear",
            "first_conv": "conv1",
            "classifier": "fc",
        },
    }


def to_safetensors(weights: Mapping[str, Tensor], known: Mapping[str, Any]) -> bytes:
    """The bytes of a safetensors file, with a checksum in its metadata, as the format has none.

    Args:
        known: the network's `facts`, kept there too.

    Raises:
        FastresError: where safetensors is not installed.
    """
    try:
        from safetensors.torch import save
    except ImportError:
        raise FastresError("safetensors is not installed: pip install 'fastres[export]'") from None
    metadata = {"format": "pt", METADATA: json.dumps({**known, "sha256": seal(known, weights)}, sort_keys=True)}
    return save({name: tensor.contiguous() for name, tensor in weights.items()}, metadata=metadata)


def write_hub(folder: Path, weights: Mapping[str, Tensor], known: dict[str, Any], label: str) -> str:
    """Write a folder for the Hugging Face Hub: weights, configuration and a card; returns the library that reads it.

    timm does where it has the network (``timm.create_model("local-dir:FOLDER", pretrained=True)``, or from the Hub),
    else ``fastres train --weights FOLDER``.

    Args:
        known: see `facts`.
        label: what the network was trained on, for the card.

    Raises:
        FastresError: for a folder that holds other files, or cannot be written.
    """
    content = to_safetensors(weights, known)
    name = known["architecture"]
    library = "timm" if differs_from_torchvision(name, weights, known["num_classes"]) is None else "fastres"
    own = {key: value for key, value in known.items() if key != "model_options" or library == "fastres"}
    config = json.dumps({**own, "library_name": library}, indent=2, ensure_ascii=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if others := sorted({path.name for path in folder.iterdir()} - set(HUB_FILES)):
            raise FastresError(f"{folder} holds {others[0]!r}, which is no export's: choose an empty folder with --out")
        card = _card(name, library, label, known)
        for file, data in zip(HUB_FILES, (content, config.encode("utf-8", "replace"), card.encode("utf-8", "replace"))):
            with atomic_write(folder / file) as out:
                out.write(data)
    except OSError as error:
        raise FastresError(f"cannot write to {folder}: {error.strerror or error}; choose another --out") from error
    return library


def _card(name: str, library: str, label: str, known: Mapping[str, Any]) -> str:
    size = known["pretrained_cfg"]["input_size"][-1]
    use = (
        'timm.create_model("hf-hub:USER/NAME", pretrained=True)'
        if library == "timm"
        else "fastres train --weights FOLDER --data ..."
    )
    return (
        f"---\nlibrary_name: {library}\ntags:\n- image-classification\n- fastres\n---\n\n# {name}\n\n"
        f"Trained by fastres on {' '.join(label.split())}; images of {size}x{size} pixels in {known['num_classes']} "
        f"classes.\n\n```\n{use}\n```\n"
    )


def write_safetensors(path: Path, weights: Mapping[str, Tensor], known: Mapping[str, Any]) -> None:
    """Write a safetensors file with the network's `facts` in it.

    Raises:
        FastresError: where it cannot be written.
    """
    write_bytes(path, to_safetensors(weights, known))
