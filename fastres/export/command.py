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
from fastres.train.checkpoint import load_checkpoint
from fastres.train.trained import Trained, evaluated_weights, find_checkpoint, load_trained

TOLERANCE = 1e-3  # of the largest logit: fp32 in another order of sums stays a hundred times below it


def export(args: argparse.Namespace) -> int:
    """Write a trained network for other programs."""
    path: Path = args.out
    if path.suffix not in EXPORTS:
        raise FastresError(f"--out {path} has none of the endings {', '.join(EXPORTS)}: they tell what to write")
    checkpoint = find_checkpoint(args.checkpoint)
    trained = load_trained(checkpoint, torch.device("cpu"))
    if path.suffix == ".pt":
        weights, _ = evaluated_weights(load_checkpoint(checkpoint))
        write_weights(path, weights)
        print(f"{path}: {len(weights)} tensors of {checkpoint}")
        return 0
    model = FromPixels(portable(trained.model), trained.mean, trained.std).requires_grad_(False)
    facts = {
        "classes": json.dumps(trained.classes),
        "image_size": str(trained.image_size),
        "input": "RGB, 0..255, [batch, 3, H, W]",
        "data": trained.data,
    }
    checked = ""
    if path.suffix == ".pt2":
        write_program(path, to_program(model, trained.image_size), facts)
    else:
        content = to_onnx(model, trained.image_size, facts)
        checked = check(content, model, trained)
        write_onnx(path, content)
    print(
        f"{path}: RGB images 0..255, fp32 [batch, 3, {trained.image_size}, {trained.image_size}], to logits of "
        f"{len(trained.classes)} classes{checked} ({checkpoint}, epoch {trained.epoch})"
    )
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
