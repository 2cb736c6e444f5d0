"""What a checkpoint must hold, by type: a whole file may still hold what no run has written."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastres.train.checkpoint import CheckpointError
from fastres.train.report import FORMS

Check = Callable[[Any], bool]


def _named(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _side(value: Any) -> bool:
    """Pixels."""
    return _count(value) and 0 < value <= 1 << 16


def _seconds(value: Any) -> bool:
    return _number(value) and value >= 0


def _words(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(map(_printable, value))


def _printable(value: Any) -> bool:
    """Text without control characters, which would steer the terminal that it is printed on."""
    return isinstance(value, str) and all(c.isprintable() or "\udc80" <= c <= "\udcff" for c in value)


def _channels(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 3 and all(map(_number, value))


def _named_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


def _average(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict) and _named_tensors(value.get("weights")) and type(value.get("started")) is bool
    )


def _history(value: Any) -> bool:
    return isinstance(value, list) and all(map(_row, value))


def _row(value: Any) -> bool:
    if not isinstance(value, dict) or not all(map(_printable, value)):
        return False
    whole = all(_count(value.get(key)) for key, form in FORMS.items() if form == "{:d}")
    return whole and all(_number(value.get(key)) or (value.get(key) is None and key == "tta_accuracy") for key in FORMS)


def _sums(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) == 4
        and all(isinstance(part, Tensor) and part.ndim == 0 for part in value[:2])
        and all(map(_count, value[2:]))
    )


NETWORK: dict[str, Check] = {
    "model": _printable,
    "model_options": _named,
    "weights": _named_tensors,
    "options": _named,
    "classes": _words,
    "mean": _channels,
    "std": lambda value: _channels(value) and all(part > 0 for part in value),
    "image_size": _side,
    "data": _printable,
    "epoch": _count,
}
RUN: dict[str, Check] = {
    **NETWORK,
    "step": _count,
    "stored_size": _side,
    "run": _printable,
    "digest": _printable,
    "average": _average,
    "optimizer": _named,
    "scaler": _named,
    "batch": _count,
    "seconds": _seconds,
    "train_seconds": _seconds,
    "epoch_seconds": _seconds,
    "tally": _sums,
    "history": _history,
}


def check_content(saved: dict[str, Any], wanted: Mapping[str, Check], source: Path, purpose: str) -> None:
    """Refuse a checkpoint that lacks an entry or has one of another type.

    Args:
        purpose: what cannot be done with it, such as "no run can go on from it".

    Raises:
        CheckpointError: names the first such entry.
    """
    for name, is_right in wanted.items():
        if name not in saved:
            raise CheckpointError(f"checkpoint {source} lacks {name!r}, so {purpose}: take another one or train again")
        if not is_right(saved[name]):
            raise CheckpointError(
                f"checkpoint {source} has no right value of {name!r}, so {purpose}: take another one or train again"
            )
