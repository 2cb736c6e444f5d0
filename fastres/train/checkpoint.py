"""Checkpoints: written whole or not at all, read without running code, checked before use."""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastres.atomic import atomic_write
from fastres.data.dataset import first_line
from fastres.errors import FastresError
from fastres.train.memory import is_out_of_memory

FORMAT = "fastres-checkpoint-1"


class CheckpointError(FastresError):
    """A checkpoint that is missing, damaged, or of another network."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint that is missing or damaged: an earlier one may do in its place."""


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write tensors and plain values to ``path`` atomically: a crash leaves the file that was there before.

    Raises:
        CheckpointError: when the folder or disk takes no more; the former file is untouched.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    try:
        with atomic_write(path) as file:
            file.write(buffer.getbuffer())
    except OSError as error:
        raise CheckpointError(
            f"cannot write checkpoint {path}: {error.strerror or error}; free space or choose another --out"
        ) from error


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint with ``weights_only=True``, so that no pickled code can run.

    Raises:
        DamagedCheckpoint: when it is missing, truncated or altered.
        CheckpointError: when it is refused as unsafe, or not a fastres checkpoint.
    """
    content = read_tensors(path, device)
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this version ({FORMAT}): train again")
    return content


def read_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """A dictionary of tensors and plain values that ``torch.save`` wrote, of fastres or not.

    Raises:
        DamagedCheckpoint, CheckpointError: as `load_checkpoint`.
    """
    path = Path(path)
    if not path.is_file():
        raise DamagedCheckpoint(f"no checkpoint at {path}: name a run folder or a .pt file that `fastres train` wrote")
    try:
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("it is compressed, which fastres never does")  # some bytes could become a whole memory
            bad = archive.testzip()  # torch.load itself does not compare the members' checksums
        if bad:
            raise DamagedCheckpoint(f"checkpoint {path} is damaged (member {bad}): take another one or train again")
        content = torch.load(path, map_location=device, weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            f"checkpoint {path} is refused: it holds more than tensors and plain values"
            f"{f' ({named[1]})' if named else ''} and could run code; take another one or train again"
        ) from error
    except MemoryError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DamagedCheckpoint(
            f"checkpoint {path} is damaged or not one of fastres ({reason}): take another one or train again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a checkpoint of this version ({FORMAT}): train again")
    return content


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor], source: Path) -> None:
    """Load a state_dict and name the first disagreement in one line.

    Raises:
        CheckpointError: when the weights belong to another network.
    """
    own = model.state_dict()
    for name in [*own, *weights]:
        if name not in weights or name not in own:
            raise CheckpointError(
                f"checkpoint {source} is of another network: {name!r} is "
                f"{'missing in it' if name not in weights else 'unknown to this one'}"
            )
        if own[name].shape != weights[name].shape:
            raise CheckpointError(
                f"checkpoint {source} is of another network: {name!r} has shape {tuple(weights[name].shape)}, "
                f"not {tuple(own[name].shape)}"
            )
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # a layout or dtype that cannot be copied
        raise CheckpointError(f"checkpoint {source} has weights of another kind ({first_line(error)})") from error
