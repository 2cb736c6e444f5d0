"""Whether two implementations of a primitive computed the same, within what their dtype's rounding explains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres.kernels.configs import precision
from fastres.kernels.types import Moments

# Share of the values that may be further apart: where a ReLU's input is zero but for rounding, its gradient is kept by
# one implementation and not by the other.
MOST_APART = 1e-3
# No such value is more than a few times the largest one; memory that was never written often is.
LARGEST = 4.0
_CHUNK = 1 << 24  # values that are compared at once, so that the comparison takes little memory


class Difference(NamedTuple):
    """Of a result from another: root mean square relative to that one's, and why it is not the same; None: it is."""

    relative: float
    fault: str | None


def difference(first: Any, other: Any, dtype: torch.dtype) -> Difference:
    """Compare all tensors of two results, nests of tuples, tensors, `Moments` and None; other values are passed over.

    Statistics that come by tiles are merged before, as their tiles may differ: `Moments` to mean and variance, and
    partial sums, fp32 [T, 2, C], to their total.

    Args:
        dtype: the coarsest that the implementations round to.
    """
    relative = 0.0
    for place, a, b in _pairs(first, other, "result"):
        if isinstance(a, Moments) and isinstance(b, Moments):
            found = _of_moments(a, b, rounding(dtype))
        elif isinstance(a, Tensor) and isinstance(b, Tensor):
            found = _of_tensors(a, b, dtype)
        else:
            found = Difference(float("inf"), f"{_kind(b)} and not {_kind(a)}")
        if found.fault is not None:
            return Difference(found.relative, f"{place} is {found.fault}")
        relative = max(relative, found.relative)
    return Difference(relative, None)


def rounding(dtype: torch.dtype) -> float:
    """How far two results may be apart, relative to the value itself and the root mean square of all.

    In 16 bits and tf32 four units in the last place: a result is rounded once or, with a residual added, twice, and so
    are operands that a prologue computes. In fp32 sums of millions of terms in another order, or a library's Winograd
    transform, cost more than a thousand of them.
    """
    if dtype == torch.float32:
        return 4 * 2.0**-10 if precision(dtype) == "tf32" else 1e-3
    return 4 * torch.finfo(dtype).eps


def coarsest(values: Iterable[Any]) -> torch.dtype:
    """The floating dtype of least precision among the tensors of a nest; float32 where there is none."""
    found = [torch.float32, *(tensor.dtype for tensor in _tensors(values) if tensor.is_floating_point())]
    return max(found, key=lambda dtype: torch.finfo(dtype).eps)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


def _pairs(a: Any, b: Any, place: str) -> Iterator[tuple[str, Any, Any]]:
    """What stands at the same place in both, as far as it should be compared."""
    if isinstance(a, tuple) and isinstance(b, tuple) and not isinstance(a, Moments) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b)):
            yield from _pairs(x, y, f"{place}[{i}]")
    elif any(isinstance(value, (Tensor, tuple)) for value in (a, b)):
        yield place, a, b


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} [{', '.join(map(str, value.shape))}] on {value.device}"
    return "None" if value is None else f"a {type(value).__name__}"


def _of_tensors(a: Tensor, b: Tensor, dtype: torch.dtype) -> Difference:
    partial = a.dtype == b.dtype == torch.float32 and a.dim() == b.dim() == 3 and a.shape[1] == 2
    shapes = (a.shape[1:], b.shape[1:]) if partial else (a.shape, b.shape)
    if shapes[0] != shapes[1] or a.dtype != b.dtype or a.device != b.device or a.is_contiguous() != b.is_contiguous():
        layout = "" if b.is_contiguous() == a.is_contiguous() else ", laid out otherwise"
        return Difference(float("inf"), f"{_kind(b)} and not {_kind(a)}{layout}")
    if not a.is_floating_point():
        same = bool((a == b).all())
        return Difference(0.0 if same else float("inf"), None if same else "not the same integers")
    if partial:
        # the rounding of the parts adds up like a random walk
        spread = a.double().square().sum(0).sqrt()
        return _apart(a.double().sum(0), b.double().sum(0), rounding(dtype), spread + _rms(spread))
    least = 8 * torch.finfo(a.dtype).tiny * torch.finfo(a.dtype).eps  # of values near the smallest that there are
    return _apart(a, b, rounding(dtype), _rms(a), least)


def _of_moments(a: Moments, b: Moments, within: float) -> Difference:
    count, mean, variance = _merged(a)
    other_count, other_mean, other_variance = _merged(b)
    if count != other_count or mean.shape != other_mean.shape:
        return Difference(float("inf"), f"statistics of {other_count:g} values and not of {count:g}")
    size = mean.abs() + variance.sqrt()
    found = {
        "mean": _apart(mean, other_mean, within, size),
        "variance": _apart(variance, other_variance, within, within * size.square()),
    }
    fault = next((f"a {name}, {one.fault}" for name, one in found.items() if one.fault is not None), None)
    return Difference(max(one.relative for one in found.values()), fault)


def _merged(moments: Moments) -> tuple[float, Tensor, Tensor]:
    """Count, mean and variance of all tiles together (Chan et al. 1979), fp64."""
    count, mean, m2 = (part.double() for part in moments)
    total, count = count.sum(), count[:, None]
    merged = (count * mean).sum(0) / total
    return total.item(), merged, (m2 + count * (mean - merged).square()).sum(0) / total


def _rms(values: Tensor) -> Tensor:
    """Root mean square of the finite values, fp64 []."""
    squares = [part.double().nan_to_num(0, 0, 0).square().sum() for part in values.reshape(-1).split(_CHUNK)]
    return (
        (torch.stack(squares).sum() / values.numel()).sqrt() if squares else values.new_zeros((), dtype=torch.float64)
    )


def _apart(a: Tensor, b: Tensor, within: float, scale: Tensor, least: float = 0.0) -> Difference:
    """How far b is from a where a is finite: more than ``within * (|a| + scale) + least`` is too far.

    Args:
        scale: like a, or a single number.
    """
    far, squares, worst, largest = [], [], [], []
    scales = scale.reshape(-1).split(_CHUNK) if scale.dim() else [scale] * (a.numel() // _CHUNK + 1)
    for x, y, size in zip(a.reshape(-1).split(_CHUNK), b.reshape(-1).split(_CHUNK), scales):
        x, y = (x.float(), y.float()) if x.dtype != torch.float64 else (x, y)
        gap = torch.where(x.isfinite(), (y - x).abs(), 0.0).nan_to_num(float("inf"), float("inf"))
        x = x.abs().nan_to_num(0, 0, 0)
        far.append((gap > within * (x + size) + least).sum())
        squares.append(gap.double().square().sum())
        worst.append(gap.max().double())
        largest.append(x.max().double())
    if not far:
        return Difference(0.0, None)
    share = torch.stack(far).sum() / a.numel()
    numbers = share.double(), torch.stack(squares).sum(), torch.stack(worst).max(), torch.stack(largest).max(), _rms(a)
    part, square, most, limit, rms = torch.stack([number.to(share.device) for number in numbers]).tolist()
    relative = 0.0 if not square else (square / a.numel()) ** 0.5 / rms if rms else float("inf")
    if part > MOST_APART:
        return Difference(relative, f"further than rounding explains in {part:.2%} of its values ({relative:.1e} rms)")
    if most > LARGEST * limit + least and part:
        return Difference(relative, f"off by {most:.1e} where the largest value is {limit:.1e}")
    return Difference(relative, None)
