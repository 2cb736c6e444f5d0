"""``fastres export``: a trained network as an ONNX file, a program of ``torch.export``, or weights for torchvision."""

from __future__ import annotations

import argparse
import json
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from fastres.arguments import EXPORTS
from fastres.errors import FastresError
from fastres.export.formats import check_onnx, to_onnx, to_program, write_onnx, write_program, write_weights
from fastres.export.portable import FromPixels, portable
from fastres.export.weights import differs_from_torchvision, facts, write_hub, write_safetensors
from fastres.train.checkpoint import load_checkpoint
from fastres.train.trained import Trained, evaluated_weights, find_checkpoint, load_trained

TOLERANCE = 1e-3  # of the largest logit: fp32 in another order of sums stays a hundred times below it


def export(args: argparse.Namespace) -> int:
    """Write a trained network for other programs."""
    path: Path = args.out
    if path.suffix not in EXPORTS:
        raise FastresError(
            f"--out {path} has none of the endings {', '.join(filter(None, EXPORTS))}: they tell what to write"
        )
    checkpoint = find_checkpoint(args.checkpoint)
    trained = load_trained(checkpoint, torch.device("cpu"))
    if path.suffix in (".pt", ".safetensors", ""):
        return export_weights(path, checkpoint, trained)
    model = FromPixels(portable(trained.model), trained.mean, trained.std).requires_grad_(False)
    notes = {
        "classes": json.dumps(trained.classes),
        "image_size": str(trained.image_size),
        "input": "RGB, 0..255, [batch, 3, H, W]",
        "data": trained.data,
    }
    checked = ""
    if path.suffix == ".pt2":
        write_program(path, to_program(model, trained.image_size), notes)
    else:
        content = to_onnx(model, trained.image_size, notes)
        checked = check(content, model, trained)
        write_onnx(path, content)
    print(
        f"{path}: RGB images 0..255, fp32 [batch, 3, {trained.image_size}, {trained.image_size}], to logits of "
        f"{len(trained.classes)} classes{checked} ({checkpoint}, epoch {trained.epoch})"
    )
    return 0


def export_weights(path: Path, checkpoint: Path, trained: Trained) -> int:
    """Write the weights alone: for torchvision, as safetensors, or a folder for the Hugging Face Hub.

    Raises:
        FastresError: where torchvision could not load them.
    """
    saved = load_checkpoint(checkpoint)
    weights, _ = evaluated_weights(saved)
    known, reader = facts(trained, saved["model"], saved["model_options"]), ""
    if path.suffix == ".pt":
        if differs := differs_from_torchvision(saved["model"], weights, len(trained.classes)):
            raise FastresError(
                f"torchvision cannot load the weights of {checkpoint} ({differs}): export to .safetensors, .onnx or "
                ".pt2"
            )
        write_weights(path, weights)
    elif path.suffix == ".safetensors":
        write_safetensors(path, weights, known)
    else:
        reader = f", for {write_hub(path, weights, known, trained.data)}"
    print(f"{path}: {len(weights)} tensors of {checkpoint}{reader}")
    return 0


def check(content: bytes, model: nn.Module, trained: Trained) -> str:
    """Compare with onnxruntime, if it is there, and tell in a few words.

    Raises:
        FastresError: where the file computes something else.
    """
    if find_spec("onnxruntime") is None:
        return "; onnxruntime is not installed, so nothing was compared"
    images = torch.randint(0, 256, (3, 3, trained.image_size, trained.image_size)).float()
    error = check_onnx(content, model, images)
    if not error <= TOLERANCE:
        raise FastresError(
            f"the ONNX file's logits are {error:.1e} off the network's: nothing was written; install another "
            "onnxruntime or export to .pt2"
        )
    return f"; onnxruntime's are within {error:.0e} of the network's"
