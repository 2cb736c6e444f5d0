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
def on_triton() -> Iterator[None]:
    """Triton kernels, fp32 products in fp32; what kernels make starts as NaN between guard bands, checked at the end.

    In the interpreter all addresses are checked too.
    """
    switch, guards = torch.backends.cudnn.conv, Guards()
    before, switch.fp32_precision = switch.fp32_precision, "ieee"
    try:
        with ops.implementation("triton"), mock.patch.object(buffers, "empty", guards.empty), checked_addresses():
            yield
    finally:
        switch.fp32_precision = before
    guards.check()
