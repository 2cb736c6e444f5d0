"""The fused operations on their Triton kernels, in fenced and poisoned memory, for the tests above the kernels' own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from support_kernels import Guards, checked_addresses

from fastres import ops
from fastres.kernels import buffers


@contextmanager
def fp32_products() -> Iterator[None]:
    """No tf32 in convolutions of fp32, neither eager PyTorch's nor the kernels'."""
    switch = torch.backends.cudnn.conv
    before, switch.fp32_precision = switch.fp32_precision, "ieee"
    try:
        yield
    finally:
        switch.fp32_precision = before


@contextmanager
def on_triton() -> Iterator[None]:
    """Triton kernels without tf32; what kernels make starts as NaN between guard bands, which are checked at the end.

    In the interpreter all addresses are checked too.
    """
    guards = Guards()
    with (
        fp32_products(),
        ops.implementation("triton"),
        mock.patch.object(buffers, "empty", guards.empty),
        checked_addresses(),
    ):
        yield
    guards.check()
