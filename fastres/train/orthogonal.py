"""Matrices made orthogonal, as Muon's updates are, many in few launches.

The Newton-Schulz iteration of Jordan et al. 2024 in bf16, ``X <- a X + (b A + c A A) X`` with ``A = X X^T``, does
nothing to columns of zeros: they stay so and change no others. So matrices of different widths can be one batch of
matrices as wide as the widest, and an iteration is three products of batches: a GPU takes as long for one small product
as for many, and a launch as long as either.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

COEFFICIENTS, STEPS, EPS = (3.4445, -4.775, 2.0315), 5, 1e-7  # those of ``torch.optim.Muon``


def orthogonalised(matrices: Sequence[Tensor]) -> list[Tensor]:
    """``U V^T`` of each matrix ``U S V^T``, about: singular values end between 0.3 and 1.3.

    Args:
        matrices: [R, C] each, of one device.

    Returns:
        bf16, some of them views of one memory.
    """
    wide = [one.T if one.shape[0] > one.shape[1] else one for one in matrices]
    found: list[Tensor] = list(wide)
    for rows in dict.fromkeys(one.shape[0] for one in wide):
        places = [place for place, one in enumerate(wide) if one.shape[0] == rows]
        columns = max(wide[place].shape[1] for place in places)
        batch = wide[0].new_zeros(len(places), rows, columns, dtype=torch.bfloat16)
        for made, place in zip(batch, places):
            made[:, : wide[place].shape[1]].copy_(wide[place])
        for made, place in zip(_iterated(batch), places):
            found[place] = made[:, : wide[place].shape[1]]
    return [one.T if matrix.shape[0] > matrix.shape[1] else one for one, matrix in zip(found, matrices)]


def _iterated(x: Tensor) -> Tensor:
    """The iteration on a batch [B, R, C] of matrices, each divided by its Frobenius norm first."""
    a, b, c = COEFFICIENTS
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=EPS)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
