"""What kernels hand to one another besides plain tensors."""

from typing import NamedTuple

from torch import Tensor

ACTIVATIONS = ("relu", "gelu")  # behind a BatchNorm; GELU with the normal distribution itself (Hendrycks & Gimpel 2016)


class Moments(NamedTuple):
    """Per-channel statistics of a [M, C] matrix by row tiles, to be merged by `finalize` (Chan et al. 1979)."""

    count: Tensor  # type: ignore[assignment]  # [T], rows in the tile; no tuple's method is meant
    mean: Tensor  # [T, C]
    m2: Tensor  # [T, C], sum of squared deviations from the tile's own mean
