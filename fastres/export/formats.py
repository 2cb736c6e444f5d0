"""Programs of ``torch.export``, ONNX files and weights, and the check of an ONNX file against the network it is of."""

from __future__ import annotations

import io
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from fastres.atomic import atomic_write
from fastres.errors import FastresError

NEEDED = ("onnx", "onnxscript")
_ANY_BATCH = ({0: Dim("batch", min=1)},)


def to_program(model: nn.Module, image_size: int, dtype: torch.dtype = torch.float32) -> ExportedProgram:
    """The program of a network in its present mode, for batches of any size.

    Args:
        model: takes images [N, 3, H, W]; see `fastres.export.portable` for one that needs no fastres to run.
        image_size: H and W, which are fixed.
        dtype: of the images.
    """
    device = next(model.parameters()).device
    images = torch.zeros(2, 3, image_size, image_size, dtype=dtype, device=device)  # of 1, the size would be fixed
    return torch.export.export(model, (images,), dynamic_shapes=_ANY_BATCH)


def to_onnx(model: nn.Module, image_size: int, facts: dict[str, str] | None = None) -> bytes:
    """A network as the bytes of one ONNX file: ``images`` fp32 [batch, 3, H, W] to ``logits`` [batch, classes].

    Args:
        model: of PyTorch's own operations, see `fastres.export.portable`.
        image_size: H and W, which are fixed.
        facts: kept as the file's metadata.

    Raises:
        FastresError: where onnx or onnxscript is not installed.
    """
    for name in NEEDED:
        if find_spec(name) is None:
            raise FastresError(f"ONNX needs the package {name}: pip install 'fastres[export]'")
    exported = torch.onnx.export(
        to_program(model, image_size),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=_ANY_BATCH,
    )
    assert exported is not None  # it is, without a file to write to
    exported.model.metadata_props.update(facts or {})
    return exported.model_proto.SerializeToString()


def check_onnx(content: bytes, model: nn.Module, images: Tensor) -> float:
    """Largest difference of the logits that onnxruntime computes from the network's own, in units of the largest logit.

    Args:
        images: fp32 [N, 3, H, W].

    Raises:
        ImportError: where onnxruntime is not installed.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    with torch.no_grad():
        expected = model(images)
    return ((torch.from_numpy(logits) - expected).abs().max() / expected.abs().max()).item()


def write_program(path: Path, program: ExportedProgram, facts: dict[str, str] | None = None) -> None:
    """Write what ``torch.export.load`` reads, ``facts`` as its extra files.

    Raises:
        FastresError: where it cannot be written.
    """
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files=facts)
    write_bytes(path, buffer.getvalue())


def write_onnx(path: Path, content: bytes) -> None:
    """Write an ONNX file.

    Raises:
        FastresError: where it cannot be written.
    """
    write_bytes(path, content)


def write_weights(path: Path, weights: dict[str, Any]) -> None:
    """Write a plain state_dict, which ``torch.load(..., weights_only=True)`` reads.

    Raises:
        FastresError: where it cannot be written.
    """
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    write_bytes(path, buffer.getvalue())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        FastresError: where it cannot be written.
    """
    try:
        with atomic_write(path) as file:
            file.write(content)
    except OSError as error:
        raise FastresError(f"cannot write {path}: {error.strerror or error}; choose another --out") from error
